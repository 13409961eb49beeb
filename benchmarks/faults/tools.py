"""The tested tools, by the name of the module in `benchmarks.peers`."""

from importlib.metadata import distributions, version

TOOLS = {
    "asgi_dbsession": "asgi-dbsession",
    "asgi_dbsession_http": 'asgi-dbsession, `@app.middleware("http")`',
    "by_hand": "hand-written",
    "by_hand_http": 'hand-written, `@app.middleware("http")`',
    "depends": "`Depends`, handlers commit",
    "depends_commit": "`Depends`, commit after `yield`",
    "depends_function": '`Depends`, commit after `yield`, `scope="function"`',
    "fastapi_async_sqlalchemy": "fastapi-async-sqlalchemy",
    "context_async_sqlalchemy": "context-async-sqlalchemy, FastAPI",
    "context_async_sqlalchemy_asgi": "context-async-sqlalchemy, ASGI",
    "fastapi_sqla": "fastapi-sqla",
    "advanced_alchemy": "advanced-alchemy",
}

_DISTRIBUTIONS = (
    "asgi-dbsession",
    "fastapi-async-sqlalchemy",
    "context-async-sqlalchemy",
    "fastapi-sqla",
    "advanced-alchemy",
    "fastapi",
    "starlette",
    "uvicorn",
    "sqlalchemy",
    "asyncpg",
)


def versions() -> str:
    """Return a sentence with the installed versions of the tools."""
    return ", ".join(f"{name} {version(name)}" for name in _DISTRIBUTIONS if _is_installed(name))


def _is_installed(name: str) -> bool:
    return any(distributions(name=name))
