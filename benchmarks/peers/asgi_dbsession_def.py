"""The handlers with `def`, with this package."""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

from asgi_dbsession import DBSessionMiddleware, SyncDatabase, get_sync_session

from . import work

database = SyncDatabase(work.URL, **work.POOL)
app = FastAPI()
app.add_middleware(DBSessionMiddleware, database)


@app.get("/nothing")
def nothing() -> Response:
    return work.nothing()


@app.get("/read")
def read() -> Response:
    return work.blocking_read(get_sync_session())


@app.post("/insert")
def insert() -> Response:
    return work.blocking_insert(get_sync_session())


@app.get("/ten")
def ten() -> Response:
    return work.blocking_ten(get_sync_session())


@app.get("/export")
def export() -> Response:
    return StreamingResponse(work.blocking_export(get_sync_session()))


@app.post("/entries/{number}")
def write(number: int, then: str = "") -> Response:
    return work.blocking_write(get_sync_session(), number)


def pool() -> Any:
    """Return the pool of the application."""
    return database.engine.pool
