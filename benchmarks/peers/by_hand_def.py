"""The handlers with `def`, with SQLAlchemy alone."""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
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


@app.post("/entries/{number}")
def write(number: int, then: str = "") -> Response:
    with sessions.begin() as session:
        return work.blocking_write(session, number)


def pool() -> Any:
    """Where the connections are."""
    return engine.pool
