"""The application with fastapi-sqla, which takes its settings from the environment.

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
from fastapi_sqla import AsyncSession
from fastapi_sqla.async_sqla import _async_session_factories

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
async def nothing() -> Response:
    return work.nothing()


@app.get("/read")
async def read(session: AsyncSession) -> Response:
    return await work.read(session)


@app.post("/insert")
async def insert(session: AsyncSession) -> Response:
    return await work.insert(session)


@app.get("/ten")
async def ten(session: AsyncSession) -> Response:
    return await work.ten(session)


@app.get("/stream")
async def stream(session: AsyncSession) -> Response:
    return StreamingResponse(work.rows(session))


@app.get("/export")
async def export(session: AsyncSession) -> Response:
    return StreamingResponse(work.export(session))


@app.get("/download")
async def download(session: AsyncSession) -> Response:
    return await work.download(session)


@app.get("/events")
async def events(session: AsyncSession) -> Response:
    return await work.events(session)


@app.post("/entries/{number}")
async def write(session: AsyncSession, number: int, then: str = "") -> Response:
    return await work.write(session, number, then)


@app.post("/transfers/{number}")
async def transfer(session: AsyncSession, number: int, then: str = "") -> Response:
    return await work.transfer(session, number, then)


def pool() -> Any:
    """Return the pool of the application."""
    return _async_session_factories["default"].kw["bind"].pool
