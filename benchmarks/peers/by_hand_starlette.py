"""The application with SQLAlchemy and Starlette alone: a session in every handler."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from . import work

engine = create_async_engine(work.URL, **work.POOL)
sessions = async_sessionmaker(engine, expire_on_commit=False)


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    yield
    await engine.dispose()


async def nothing(_request: Request) -> Response:
    return work.nothing()


async def read(_request: Request) -> Response:
    async with sessions() as session, session.begin():
        return await work.read(session)


async def insert(_request: Request) -> Response:
    async with sessions() as session, session.begin():
        return await work.insert(session)


async def ten(_request: Request) -> Response:
    async with sessions() as session, session.begin():
        return await work.ten(session)


async def export(_request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        async with sessions() as session, session.begin():
            async for part in work.export(session):
                yield part

    return StreamingResponse(parts())


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/nothing", nothing),
        Route("/read", read),
        Route("/insert", insert, methods=["POST"]),
        Route("/ten", ten),
        Route("/export", export),
    ],
)


def pool() -> Any:
    """Return the pool of the application."""
    return engine.pool
