"""The handlers with `def`, with fastapi-sqla.

https://github.com/dialoguemd/fastapi-sqla
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import fastapi_sqla
import structlog
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from fastapi_sqla import Session
from fastapi_sqla.sqla import _session_factories

from . import work

# It logs whole tracebacks; an installed `rich` needs seconds to draw them.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))

os.environ |= {"sqlalchemy_url": work.URL}
os.environ |= {f"sqlalchemy_{name}": str(value) for name, value in work.POOL.items()}


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await fastapi_sqla.startup()
    yield


app = FastAPI(lifespan=lifespan)
fastapi_sqla.setup_middlewares(app)


@app.get("/nothing")
def nothing() -> Response:
    return work.nothing()


@app.get("/read")
def read(session: Session) -> Response:
    return work.blocking_read(session)


@app.post("/insert")
def insert(session: Session) -> Response:
    return work.blocking_insert(session)


@app.get("/ten")
def ten(session: Session) -> Response:
    return work.blocking_ten(session)


@app.get("/export")
def export(session: Session) -> Response:
    return StreamingResponse(work.blocking_export(session))


@app.post("/entries/{number}")
def write(session: Session, number: int, then: str = "") -> Response:
    return work.blocking_write(session, number)


def pool() -> Any:
    """Return the pool of the application."""
    return _session_factories["default"].kw["bind"].pool
