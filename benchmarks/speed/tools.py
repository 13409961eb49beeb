"""The measured tools, by the names of the modules in `benchmarks.peers`."""

from importlib.util import find_spec

from benchmarks.faults.tools import TOOLS

OURS, BY_HAND, DEPENDS = "asgi_dbsession", "by_hand", "depends"
TRANSACTION = "asgi_dbsession_transaction"

FASTAPI = (
    BY_HAND,
    OURS,
    TRANSACTION,
    DEPENDS,
    "depends_function",
    "fastapi_async_sqlalchemy",
    "context_async_sqlalchemy",
    "context_async_sqlalchemy_asgi",
    "fastapi_sqla",
    "advanced_alchemy",
)
# Not every tool works with this driver.
PSYCOPG = (BY_HAND, OURS, TRANSACTION, DEPENDS)
STARLETTE = ("by_hand_starlette", "asgi_dbsession_starlette")
DEF = (
    "by_hand_def",
    "asgi_dbsession_def",
    "depends_def",
    "fastapi_sqla_def",
    "advanced_alchemy_def",
)
# Each of these groups is compared within itself, in one process.
FAMILIES = {
    "FastAPI": FASTAPI,
    "FastAPI with psycopg": PSYCOPG,
    "Starlette alone": STARLETTE,
    "FastAPI, handlers with `def`": DEF,
}
# The groups that are measured over a server too.
OVER_UVICORN = ("FastAPI", "FastAPI, handlers with `def`")
# A short run leaves out these tools, and tools that are not installed.
FEW = (
    BY_HAND,
    OURS,
    TRANSACTION,
    DEPENDS,
    *STARLETTE,
    "by_hand_def",
    "asgi_dbsession_def",
    "depends_def",
)

_TITLES = {**TOOLS, TRANSACTION: "asgi-dbsession, `autocommit_reads=False`"}
_PACKAGES = (
    "fastapi_async_sqlalchemy",
    "context_async_sqlalchemy",
    "fastapi_sqla",
    "advanced_alchemy",
)


def base(tool: str) -> str:
    """Return the tool of an application, for each kind of handlers: a column of a table."""
    return tool.removesuffix("_def").removesuffix("_starlette")


def title(tool: str) -> str:
    """Return the name of the tool in a table."""
    return _TITLES[base(tool)]


def is_installed(tool: str) -> bool:
    """Return True if the tool is installed here."""
    package = base(tool).removesuffix("_asgi")
    return package not in _PACKAGES or find_spec(package) is not None
