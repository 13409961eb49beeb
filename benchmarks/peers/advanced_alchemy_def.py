"""The handlers with `def`, with advanced-alchemy's extension for FastAPI.

https://docs.advanced-alchemy.litestar.dev/latest/usage/frameworks/fastapi.html
"""

from typing import Annotated, Any

from advanced_alchemy.extensions.fastapi import (
    AdvancedAlchemy,
    EngineConfig,
    SQLAlchemySyncConfig,
    SyncSessionConfig,
)
from fastapi import Depends, FastAPI
from fastapi.responses import Response, StreamingResponse
from sqlalchemy.orm import Session

from . import work

config = SQLAlchemySyncConfig(
    connection_string=work.URL,
    engine_config=EngineConfig(**work.POOL),
    session_config=SyncSessionConfig(expire_on_commit=False),
    commit_mode="autocommit",
)
app = FastAPI()
alchemy = AdvancedAlchemy(config=config, app=app)
Database = Annotated[Session, Depends(alchemy.provide_session())]


@app.get("/nothing")
def nothing() -> Response:
    return work.nothing()


@app.get("/read")
def read(session: Database) -> Response:
    return work.blocking_read(session)


@app.post("/insert")
def insert(session: Database) -> Response:
    return work.blocking_insert(session)


@app.get("/ten")
def ten(session: Database) -> Response:
    return work.blocking_ten(session)


@app.get("/export")
def export(session: Database) -> Response:
    return StreamingResponse(work.blocking_export(session))


@app.post("/entries/{number}")
def write(session: Database, number: int, then: str = "") -> Response:
    return work.blocking_write(session, number)


def pool() -> Any:
    """Return the pool of the application."""
    return config.get_engine().pool
