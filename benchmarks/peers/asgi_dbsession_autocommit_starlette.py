"""The application with this package and Starlette alone, which reads in autocommit."""

from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

from . import work

database = AsyncDatabase(work.URL, **work.POOL)
reads = AsyncDatabase(
    work.URL,
    isolation_level="AUTOCOMMIT",
    connect_args={"server_settings": {"default_transaction_read_only": "on"}},
    **work.POOL,
)


async def nothing(_request: Request) -> Response:
    return work.nothing()


async def read(_request: Request) -> Response:
    return await work.read(reads.get_session())


async def insert(_request: Request) -> Response:
    return await work.insert(get_session())


async def ten(_request: Request) -> Response:
    return await work.ten(reads.get_session())


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
app.add_middleware(DBSessionMiddleware, database, reads)


def pool() -> Any:
    """Where the connections are."""
    return database.engine.pool
