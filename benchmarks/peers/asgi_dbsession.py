"""The application with this package."""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

from . import work


async def nothing() -> Response:
    return work.nothing()


async def read() -> Response:
    return await work.read(get_session())


async def insert() -> Response:
    return await work.insert(get_session())


async def ten() -> Response:
    return await work.ten(get_session())


async def stream() -> Response:
    return StreamingResponse(work.rows(get_session()))


async def export() -> Response:
    return StreamingResponse(work.export(get_session()))


async def download() -> Response:
    return await work.download(get_session())


async def events() -> Response:
    return await work.events(get_session())


async def write(number: int, then: str = "") -> Response:
    return await work.write(get_session(), number, then)


async def transfer(number: int, then: str = "") -> Response:
    return await work.transfer(get_session(), number, then)


# The same order in every application, because a router tries one route after the other.
_ROUTES = {
    "/nothing": ("GET", nothing),
    "/read": ("GET", read),
    "/insert": ("POST", insert),
    "/ten": ("GET", ten),
    "/stream": ("GET", stream),
    "/export": ("GET", export),
    "/download": ("GET", download),
    "/events": ("GET", events),
    "/entries/{number}": ("POST", write),
    "/transfers/{number}": ("POST", transfer),
}


def application(database: AsyncDatabase) -> FastAPI:
    """The application on a database."""
    made = FastAPI()
    made.add_middleware(DBSessionMiddleware, database)
    for path, (method, handler) in _ROUTES.items():
        made.add_api_route(path, handler, methods=[method])
    return made


database = AsyncDatabase(work.URL, **work.POOL)
app = application(database)


def pool() -> Any:
    """Return the pool of the application."""
    return database.engine.pool
