"""The application with `scope="function"`: code after `yield` runs before the response is sent.

https://fastapi.tiangolo.com/tutorial/dependencies/dependencies-with-yield/
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.responses import Response, StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from . import work

engine = create_async_engine(work.URL, **work.POOL)
sessions = async_sessionmaker(engine, expire_on_commit=False)


async def get_db() -> AsyncIterator[AsyncSession]:
    async with sessions() as db, db.begin():
        yield db


Database = Annotated[AsyncSession, Depends(get_db, scope="function")]


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.get("/nothing")
async def nothing() -> Response:
    return work.nothing()


@app.get("/read")
async def read(db: Database) -> Response:
    return await work.read(db)


@app.post("/insert")
async def insert(db: Database) -> Response:
    return await work.insert(db)


@app.get("/ten")
async def ten(db: Database) -> Response:
    return await work.ten(db)


@app.get("/stream")
async def stream() -> Response:
    async def rows() -> AsyncIterator[bytes]:
        # The session of the request would be closed by then.
        async with sessions() as db, db.begin():
            async for row in work.rows(db):
                yield row

    return StreamingResponse(rows())


@app.get("/export")
async def export() -> Response:
    async def parts() -> AsyncIterator[bytes]:
        # The session of the request would be closed by then.
        async with sessions() as db, db.begin():
            async for part in work.export(db):
                yield part

    return StreamingResponse(parts())


@app.get("/download")
async def download(db: Database) -> Response:
    return await work.download(db)


@app.get("/events")
async def events(db: Database) -> Response:
    return await work.events(db)


@app.post("/entries/{number}")
async def write(db: Database, number: int, then: str = "") -> Response:
    return await work.write(db, number, then)


@app.post("/transfers/{number}")
async def transfer(db: Database, number: int, then: str = "") -> Response:
    return await work.transfer(db, number, then)


def pool() -> Any:
    """Return the pool of the application."""
    return engine.pool
