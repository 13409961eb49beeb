"""The application with SQLAlchemy alone: a session and its transaction in every handler.

https://docs.sqlalchemy.org/en/20/orm/session_basics.html#framing-out-a-begin-commit-rollback-block
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from . import work

engine = create_async_engine(work.URL, **work.POOL)
sessions = async_sessionmaker(engine, expire_on_commit=False)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.get("/nothing")
async def nothing() -> Response:
    return work.nothing()


@app.get("/read")
async def read() -> Response:
    async with sessions() as session, session.begin():
        return await work.read(session)


@app.post("/insert")
async def insert() -> Response:
    async with sessions() as session, session.begin():
        return await work.insert(session)


@app.get("/ten")
async def ten() -> Response:
    async with sessions() as session, session.begin():
        return await work.ten(session)


@app.get("/stream")
async def stream() -> Response:
    async def rows() -> AsyncIterator[bytes]:
        async with sessions() as session, session.begin():
            async for row in work.rows(session):
                yield row

    return StreamingResponse(rows())


@app.get("/export")
async def export() -> Response:
    async def parts() -> AsyncIterator[bytes]:
        async with sessions() as session, session.begin():
            async for part in work.export(session):
                yield part

    return StreamingResponse(parts())


@app.get("/download")
async def download() -> Response:
    async with sessions() as session, session.begin():
        return await work.download(session)


@app.get("/events")
async def events() -> Response:
    async with sessions() as session, session.begin():
        return await work.events(session)


@app.post("/entries/{number}")
async def write(number: int, then: str = "") -> Response:
    async with sessions() as session, session.begin():
        return await work.write(session, number, then)


@app.post("/transfers/{number}")
async def transfer(number: int, then: str = "") -> Response:
    async with sessions() as session, session.begin():
        return await work.transfer(session, number, then)


def pool() -> Any:
    """Return the pool of the application."""
    return engine.pool
