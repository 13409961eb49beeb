"""The small application that the servers serve: a copy of this file, in a folder of its own."""

import os
from collections.abc import AsyncIterator
from typing import Any

import anyio
from anyio import to_thread
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_dbsession import (
    AsyncDatabase,
    DBSessionMiddleware,
    SyncDatabase,
    get_session,
    get_sync_session,
)


def describe(way: str) -> AsyncDatabase | SyncDatabase:
    """The database that `DATABASE_URL` names, in the way that a server needs it."""
    small: Any = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 5}
    if way == "engine":
        return AsyncDatabase.from_engine(create_async_engine(os.environ["DATABASE_URL"], **small))
    return SyncDatabase.from_env(**small) if way == "sync" else AsyncDatabase.from_env(**small)


database = describe(os.environ.get("SHOP_DATABASE", "async"))
listeners: set[anyio.Event] = set()


async def execute(sql: str, **values: str) -> Any:
    """Run a statement on the session of the request."""
    if isinstance(database, AsyncDatabase):
        return await get_session().execute(text(sql), values)
    return await to_thread.run_sync(lambda: get_sync_session().execute(text(sql), values))


async def commit() -> None:
    """Commit the work so far, and return the connection to the pool."""
    if isinstance(database, AsyncDatabase):
        await get_session().commit()
    else:
        await to_thread.run_sync(lambda: get_sync_session().commit())


async def notes() -> list[str]:
    """Return all stored rows."""
    return list((await execute("SELECT note FROM entry ORDER BY id")).scalars())


async def entries(_request: Request) -> Response:
    return JSONResponse(await notes())


async def store(note: str) -> None:
    """Store a note; some notes cause errors."""
    await execute("INSERT INTO entry (note) VALUES (:note)", note=note)
    if note == "doomed":
        await execute("INSERT INTO child (entry_id) VALUES (-1)")
    if note == "broken":
        raise LookupError(note)
    if note == "slow":
        await execute("SELECT pg_sleep(0.5)")


async def add(request: Request) -> Response:
    await store((await request.body()).decode())
    return PlainTextResponse("stored", 201)


async def chat(websocket: WebSocket) -> None:
    """Store each text, and send it back."""
    await websocket.accept()
    async for note in websocket.iter_text():
        await store(note)
        if note == "refused":
            await websocket.close(1008)
            return
        await websocket.send_text("stored")


async def deny(websocket: WebSocket) -> None:
    await store("denied")
    await websocket.close()


async def notify(_request: Request) -> Response:
    for each in listeners:
        each.set()
    return PlainTextResponse("told")


async def stream(_request: Request) -> Response:
    """Store rows for as long as the client listens."""

    async def parts() -> AsyncIterator[bytes]:
        while True:
            await execute("INSERT INTO entry (note) VALUES (NULL)")
            yield b"part"
            await anyio.sleep(0.01)

    return StreamingResponse(parts())


async def events(_request: Request) -> Response:
    """Send server-sent events: the stored rows at each request of `notify`."""

    async def news() -> AsyncIterator[str]:
        yield ": listening\n\n"
        while True:
            told = anyio.Event()
            listeners.add(told)
            await told.wait()
            listeners.discard(told)
            found = await notes()
            await commit()  # returns the connection during the wait
            yield f"data: {','.join(found)}\n\n"

    return StreamingResponse(news(), media_type="text/event-stream")


async def status(request: Request) -> Response:
    pool: Any = database.engine.pool
    return JSONResponse(
        {"held": pool.checkedout(), "pid": os.getpid(), "asgi": request.scope["asgi"]}
    )


shop = DBSessionMiddleware(
    Starlette(
        routes=[
            Route("/", entries),
            Route("/", add, methods=["POST"]),
            Route("/stream", stream),
            Route("/events", events),
            Route("/notify", notify, methods=["POST"]),
            Route("/status", status),
            WebSocketRoute("/chat", chat),
            WebSocketRoute("/deny", deny),
        ]
    ),
    database,
)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """The shop, which prints the connections that are open after its lifespan."""
    pool: Any = None

    async def tell_then_send(message: Any) -> None:
        nonlocal pool
        if message["type"] == "lifespan.startup.complete":
            pool = database.engine.pool
        elif message["type"] == "lifespan.shutdown.complete":
            # One write call, so that the lines of several workers do not mix.
            os.write(1, f"connections left: {pool.checkedin()}\n".encode())
        await send(message)

    await shop(scope, receive, tell_then_send if scope["type"] == "lifespan" else send)
