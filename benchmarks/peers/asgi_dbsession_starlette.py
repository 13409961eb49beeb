"""The application with this package and Starlette alone, so that less is around it."""

from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

from . import work

database = AsyncDatabase(work.URL, **work.POOL)


async def nothing(_request: Request) -> Response:
    return work.nothing()


async def read(_request: Request) -> Response:
    return await work.read(get_session())


async def insert(_request: Request) -> Response:
    return await work.insert(get_session())


async def ten(_request: Request) -> Response:
    return await work.ten(get_session())


async def export(_request: Request) -> Response:
    return StreamingResponse(work.export(get_session()))


app = Starlette(
    routes=[
        Route("/nothing", nothing),
        Route("/read", read),
        Route("/insert", insert, methods=["POST"]),
        Route("/ten", ten),
        Route("/export", export),
    ]
)
app.add_middleware(DBSessionMiddleware, database)


def pool() -> Any:
    """Return the pool of the application."""
    return database.engine.pool
