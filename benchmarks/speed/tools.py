"""Who is measured beside whom, by the names of the modules in `benchmarks.peers`."""

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
STARLETTE = ("by_hand_starlette", "asgi_dbsession_starlette")
DEF = (
    "by_hand_def",
    "asgi_dbsession_def",
    "depends_def",
    "fastapi_sqla_def",
    "advanced_alchemy_def",
)
# Each is measured in turn within itself, in one process.
FAMILIES = {
    "FastAPI": FASTAPI,
    "FastAPI with psycopg": FASTAPI,
    "Starlette alone": STARLETTE,
    "FastAPI, handlers with `def`": DEF,
}
# The families that are measured over a server too.
OVER_UVICORN = ("FastAPI", "FastAPI, handlers with `def`")
# What a short run leaves out, besides what is not installed.
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
    """The tool of an application, whichever kind of handlers it has: a column of a table."""
    return tool.removesuffix("_def").removesuffix("_starlette")


def title(tool: str) -> str:
    """What a table calls it."""
    return _TITLES[base(tool)]


def is_installed(tool: str) -> bool:
    """Whether it can be measured here."""
    package = base(tool).removesuffix("_asgi")
    return package not in _PACKAGES or find_spec(package) is not None
