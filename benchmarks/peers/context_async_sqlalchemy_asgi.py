"""The application with context-async-sqlalchemy and its middleware for any ASGI application.

https://krylosov-aa.github.io/context-async-sqlalchemy/
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    db_session,
    new_non_ctx_session,
)
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from . import work

engines: list[AsyncEngine] = []


def create_engine(_host: str) -> AsyncEngine:
    engines[:] = [create_async_engine(work.URL, **work.POOL)]
    return engines[0]


def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)


connection = DBConnect(
    host="127.0.0.1", engine_creator=create_engine, session_maker_creator=create_session_maker
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await connection.connect("127.0.0.1")
    yield
    await connection.close()


app = FastAPI(lifespan=lifespan)
app.add_middleware(ASGIHTTPDBSessionMiddleware)


@app.get("/nothing")
async def nothing() -> Response:
    return work.nothing()


@app.get("/read")
async def read() -> Response:
    return await work.read(await db_session(connection))


@app.post("/insert")
async def insert() -> Response:
    return await work.insert(await db_session(connection))


@app.get("/ten")
async def ten() -> Response:
    return await work.ten(await db_session(connection))


@app.get("/stream")
async def stream() -> Response:
    async def rows() -> AsyncIterator[bytes]:
        async with new_non_ctx_session(connection) as session:
            async for row in work.rows(session):
                yield row

    return StreamingResponse(rows())


@app.get("/export")
async def export() -> Response:
    async def parts() -> AsyncIterator[bytes]:
        async with new_non_ctx_session(connection) as session:
            async for part in work.export(session):
                yield part

    return StreamingResponse(parts())


@app.get("/download")
async def download() -> Response:
    return await work.download(await db_session(connection))


@app.get("/events")
async def events() -> Response:
    return await work.events(await db_session(connection))


@app.post("/entries/{number}")
async def write(number: int, then: str = "") -> Response:
    return await work.write(await db_session(connection), number, then)


@app.post("/transfers/{number}")
async def transfer(number: int, then: str = "") -> Response:
    return await work.transfer(await db_session(connection), number, then)


def pool() -> Any:
    """Return the pool of the application."""
    return engines[0].pool
