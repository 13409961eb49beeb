"""The application with fastapi-async-sqlalchemy, which commits on its own with `commit_on_exit`.

https://h0rn3t.github.io/fastapi-async-sqlalchemy/
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db
from sqlalchemy.ext.asyncio import create_async_engine

from . import work

engine = create_async_engine(work.URL, **work.POOL)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
app.add_middleware(SQLAlchemyMiddleware, custom_engine=engine, commit_on_exit=True)


@app.get("/nothing")
async def nothing() -> Response:
    return work.nothing()


@app.get("/read")
async def read() -> Response:
    return await work.read(db.session)


@app.post("/insert")
async def insert() -> Response:
    return await work.insert(db.session)


@app.get("/ten")
async def ten() -> Response:
    return await work.ten(db.session)


@app.get("/stream")
async def stream() -> Response:
    async def rows() -> AsyncIterator[bytes]:
        async with db():  # as its documentation says for streams
            async for row in work.rows(db.session):
                yield row

    return StreamingResponse(rows())


@app.get("/export")
async def export() -> Response:
    async def parts() -> AsyncIterator[bytes]:
        async with db():  # as its documentation says for streams
            async for part in work.export(db.session):
                yield part

    return StreamingResponse(parts())


@app.get("/download")
async def download() -> Response:
    return await work.download(db.session)


@app.get("/events")
async def events() -> Response:
    return await work.events(db.session)


@app.post("/entries/{number}")
async def write(number: int, then: str = "") -> Response:
    return await work.write(db.session, number, then)


@app.post("/transfers/{number}")
async def transfer(number: int, then: str = "") -> Response:
    return await work.transfer(db.session, number, then)


def pool() -> Any:
    """Return the pool of the application."""
    return engine.pool
