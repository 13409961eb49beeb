"""The application with this package."""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

from . import work

database = AsyncDatabase(work.URL, **work.POOL)
app = FastAPI()
app.add_middleware(DBSessionMiddleware, database)


@app.get("/nothing")
async def nothing() -> Response:
    return work.nothing()


@app.get("/read")
async def read() -> Response:
    return await work.read(get_session())


@app.post("/insert")
async def insert() -> Response:
    return await work.insert(get_session())


@app.get("/ten")
async def ten() -> Response:
    return await work.ten(get_session())


@app.get("/stream")
async def stream() -> Response:
    return StreamingResponse(work.rows(get_session()))


@app.get("/export")
async def export() -> Response:
    return StreamingResponse(work.export(get_session()))


@app.get("/download")
async def download() -> Response:
    return await work.download(get_session())


@app.get("/events")
async def events() -> Response:
    return await work.events(get_session())


@app.post("/entries/{number}")
async def write(number: int, then: str = "") -> Response:
    return await work.write(get_session(), number, then)


@app.post("/transfers/{number}")
async def transfer(number: int, then: str = "") -> Response:
    return await work.transfer(get_session(), number, then)


def pool() -> Any:
    """Where the connections are."""
    return database.engine.pool
