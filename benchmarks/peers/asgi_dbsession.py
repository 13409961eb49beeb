"""The application with this package."""

from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response, StreamingResponse

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

from . import work

router = APIRouter()


@router.get("/nothing")
async def nothing() -> Response:
    return work.nothing()


@router.get("/read")
async def read() -> Response:
    return await work.read(get_session())


@router.post("/insert")
async def insert() -> Response:
    return await work.insert(get_session())


@router.get("/ten")
async def ten() -> Response:
    return await work.ten(get_session())


@router.get("/stream")
async def stream() -> Response:
    return StreamingResponse(work.rows(get_session()))


@router.get("/export")
async def export() -> Response:
    return StreamingResponse(work.export(get_session()))


@router.get("/download")
async def download() -> Response:
    return await work.download(get_session())


@router.get("/events")
async def events() -> Response:
    return await work.events(get_session())


@router.post("/entries/{number}")
async def write(number: int, then: str = "") -> Response:
    return await work.write(get_session(), number, then)


@router.post("/transfers/{number}")
async def transfer(number: int, then: str = "") -> Response:
    return await work.transfer(get_session(), number, then)


def application(database: AsyncDatabase) -> FastAPI:
    """The application on a database."""
    made = FastAPI()
    made.add_middleware(DBSessionMiddleware, database)
    made.include_router(router)
    return made


database = AsyncDatabase(work.URL, **work.POOL)
app = application(database)


def pool() -> Any:
    """Where the connections are."""
    return database.engine.pool
