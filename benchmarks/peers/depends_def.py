"""The handlers with `def`, with FastAPI's own `get_db`; they commit, as in its tutorial.

https://fastapi.tiangolo.com/tutorial/sql-databases/
"""

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.responses import Response, StreamingResponse
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from . import work

engine = create_engine(work.URL, **work.POOL)
sessions = sessionmaker(engine, expire_on_commit=False)


def get_db() -> Iterator[Session]:
    db = sessions()
    try:
        yield db
    finally:
        db.close()


Database = Annotated[Session, Depends(get_db)]

app = FastAPI()


@app.get("/nothing")
def nothing() -> Response:
    return work.nothing()


@app.get("/read")
def read(db: Database) -> Response:
    return work.blocking_read(db)


@app.post("/insert")
def insert(db: Database) -> Response:
    response = work.blocking_insert(db)
    db.commit()
    return response


@app.get("/ten")
def ten(db: Database) -> Response:
    return work.blocking_ten(db)


@app.get("/export")
def export(db: Database) -> Response:
    return StreamingResponse(work.blocking_export(db))


@app.post("/entries/{number}")
def write(db: Database, number: int, then: str = "") -> Response:
    response = work.blocking_write(db, number)
    db.commit()
    return response


def pool() -> Any:
    """Return the pool of the application."""
    return engine.pool
