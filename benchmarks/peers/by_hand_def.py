"""The handlers with `def`, with SQLAlchemy alone."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from . import work

engine = create_engine(work.URL, **work.POOL)
sessions = sessionmaker(engine, expire_on_commit=False)
app = FastAPI()


@app.get("/nothing")
def nothing() -> Response:
    return work.nothing()


@app.get("/read")
def read() -> Response:
    with sessions.begin() as session:
        return work.blocking_read(session)


@app.post("/insert")
def insert() -> Response:
    with sessions.begin() as session:
        return work.blocking_insert(session)


@app.get("/ten")
def ten() -> Response:
    with sessions.begin() as session:
        return work.blocking_ten(session)


@app.get("/export")
def export() -> Response:
    def parts() -> Iterator[bytes]:
        with sessions.begin() as session:
            yield from work.blocking_export(session)

    return StreamingResponse(parts())


@app.post("/entries/{number}")
def write(number: int, then: str = "") -> Response:
    with sessions.begin() as session:
        return work.blocking_write(session, number)


def pool() -> Any:
    """Return the pool of the application."""
    return engine.pool
