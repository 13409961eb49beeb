"""The application with FastAPI's own `get_db`; the handlers commit, as in its tutorial.

https://fastapi.tiangolo.com/tutorial/dependencies/dependencies-with-yield/
https://fastapi.tiangolo.com/tutorial/sql-databases/
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
    db = sessions()
    try:
        yield db
    finally:
        await db.close()


Database = Annotated[AsyncSession, Depends(get_db)]


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
    response = await work.insert(db)
    await db.commit()
    return response


@app.get("/ten")
async def ten(db: Database) -> Response:
    return await work.ten(db)


@app.get("/stream")
async def stream(db: Database) -> Response:
    return StreamingResponse(work.rows(db))


@app.get("/export")
async def export(db: Database) -> Response:
    return StreamingResponse(work.export(db))


@app.get("/download")
async def download(db: Database) -> Response:
    return await work.download(db)


@app.get("/events")
async def events(db: Database) -> Response:
    return await work.events(db)


@app.post("/entries/{number}")
async def write(db: Database, number: int, then: str = "") -> Response:
    response = await work.write(db, number, then)
    await db.commit()
    return response


@app.post("/transfers/{number}")
async def transfer(db: Database, number: int, then: str = "") -> Response:
    response = await work.transfer(db, number, then)
    await db.commit()
    return response


def pool() -> Any:
    """Return the pool of the application."""
    return engine.pool
