"""The application with advanced-alchemy's extension for FastAPI, in its mode "autocommit".

https://docs.advanced-alchemy.litestar.dev/latest/usage/frameworks/fastapi.html
"""

from typing import Annotated, Any

from advanced_alchemy.extensions.fastapi import (
    AdvancedAlchemy,
    AsyncSessionConfig,
    EngineConfig,
    SQLAlchemyAsyncConfig,
)
from fastapi import Depends, FastAPI
from fastapi.responses import Response, StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession

from . import work

config = SQLAlchemyAsyncConfig(
    connection_string=work.URL,
    engine_config=EngineConfig(**work.POOL),
    session_config=AsyncSessionConfig(expire_on_commit=False),
    commit_mode="autocommit",
)
app = FastAPI()
alchemy = AdvancedAlchemy(config=config, app=app)
Database = Annotated[AsyncSession, Depends(alchemy.provide_session())]


@app.get("/nothing")
async def nothing() -> Response:
    return work.nothing()


@app.get("/read")
async def read(session: Database) -> Response:
    return await work.read(session)


@app.post("/insert")
async def insert(session: Database) -> Response:
    return await work.insert(session)


@app.get("/ten")
async def ten(session: Database) -> Response:
    return await work.ten(session)


@app.get("/stream")
async def stream(session: Database) -> Response:
    return StreamingResponse(work.rows(session))


@app.get("/export")
async def export(session: Database) -> Response:
    return StreamingResponse(work.export(session))


@app.get("/download")
async def download(session: Database) -> Response:
    return await work.download(session)


@app.get("/events")
async def events(session: Database) -> Response:
    return await work.events(session)


@app.post("/entries/{number}")
async def write(session: Database, number: int, then: str = "") -> Response:
    return await work.write(session, number, then)


@app.post("/transfers/{number}")
async def transfer(session: Database, number: int, then: str = "") -> Response:
    return await work.transfer(session, number, then)


def pool() -> Any:
    """Return the pool of the application."""
    return config.get_engine().pool
