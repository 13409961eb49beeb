"""Tests the `Server-Timing` header, which tells browsers the time of the database."""

import asyncio
import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
from asgi import Exchange, Life, Socket, get, respond
from conftest import ENTRY, Running, real_database
from sqlalchemy import select

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DBSessionMiddleware,
    ServerTimingMiddleware,
    UnitReport,
)

pytestmark = pytest.mark.anyio

KINDS = ("sqlite", "asyncpg", "psycopg-sync")
METRICS = r'db;desc="statements: (\d+)";dur=(\d+\.\d), db_wait;dur=(\d+\.\d)'


def timed(app: Any, *databases: Any, **options: Any) -> Any:
    """The application with both middlewares."""
    inner = DBSessionMiddleware(app, *databases, on_report=ServerTimingMiddleware.note, **options)
    return ServerTimingMiddleware(inner)


def headers(exchange: Exchange) -> list[tuple[bytes, bytes]]:
    """The statements of the response are counted."""
    found: list[tuple[bytes, bytes]] = exchange.messages[0]["headers"]
    return found


@pytest.mark.parametrize("attempts", [1, 2])
async def test_the_header_tells_of_the_response(running: Running, attempts: int) -> None:
    """Later work is not in the header; the application's own headers stay."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        await running.execute(select(ENTRY))
        own = [(b"server-timing", b"app;dur=1")]
        await send({"type": "http.response.start", "status": 200, "headers": own})
        await running.execute(select(ENTRY))
        await send({"type": "http.response.body", "body": b"ok"})

    exchange = await get(timed(app, running.database, attempts=attempts))
    (own, (name, value)) = headers(exchange)
    assert (own, name) == ((b"server-timing", b"app;dur=1"), b"server-timing")
    match = re.fullmatch(METRICS, value.decode())
    assert match
    assert match[1] == "2"
    assert exchange.kinds == ["response.start", "response.body"]


async def test_a_response_without_a_session_has_no_header(running: Running) -> None:
    """Without a session there is no header."""
    exchange = await get(timed(lambda _, __, send: respond(send), running.database))
    assert headers(exchange) == []


async def test_all_databases_and_units_of_the_request_count(tmp_path: Path) -> None:
    """Work before the response is counted; each statement counts once."""
    one, two = real_database("sqlite", tmp_path), real_database("asyncpg", tmp_path)
    url = two.url.set(drivername="postgresql+asyncpg")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Running(two, second).execute(select(ENTRY))
        await Running(one, first).execute(select(ENTRY))
        async with second.begin() as session:
            await session.execute(select(ENTRY))
        await respond(send)

    async with one.describe() as first, AsyncDatabase(url) as second:
        value = headers(await get(timed(app, first, second)))[0][1].decode()
    match = re.fullmatch(METRICS, value)
    assert match
    assert match[1] == "3"


@pytest.mark.parametrize("real", ["sqlite"], indirect=True)
@pytest.mark.parametrize("starts", [True, False])
async def test_no_report_is_kept_once_the_header_has_left(running: Running, starts: bool) -> None:
    """An endless stream and a task after its request need no additional memory."""
    reports: list[weakref.ref[UnitReport]] = []

    def note(report: UnitReport) -> None:
        reports.append(weakref.ref(report))
        ServerTimingMiddleware.note(report)

    async def work() -> None:
        if not starts:
            await served.wait()
        for _ in range(3):
            async with database.begin() as session:
                await session.execute(select(ENTRY))
        gc.collect()
        alive.append(sum(each() is not None for each in reports))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        if starts:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await work()
            await send({"type": "http.response.body", "body": b"ok"})
        else:
            tasks.append(asyncio.create_task(work()))
            raise LookupError

    database: Any = running.database
    alive: list[int] = []
    served, tasks = asyncio.Event(), list[asyncio.Task[None]]()
    await get(ServerTimingMiddleware(DBSessionMiddleware(app, database, on_report=note)))
    served.set()
    await asyncio.gather(*tasks)
    assert (len(reports), alive) == (4, [0])


async def test_other_scopes_pass_untouched(running: Running) -> None:
    """WebSockets and lifespans get no header."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        await receive()
        await running.execute(select(ENTRY))
        await send({"type": "websocket.accept"})

    served = timed(app, type(running.database)(running.real.url))
    assert (await Life(served).run()).messages[0]["type"] == "lifespan.startup.complete"
    socket = await Socket(timed(app, running.database)).run()
    assert [each["type"] for each in socket.messages] == ["websocket.accept"]


@pytest.mark.parametrize("wrong", [None, AsyncDatabase("sqlite://")], ids=repr)
def test_what_is_no_application_is_refused(wrong: Any) -> None:
    """The error comes when the application is built, not with each request."""
    with pytest.raises(ConfigurationError, match="wraps an ASGI application, not something of"):
        ServerTimingMiddleware(wrong)


async def test_the_class_itself_as_on_report_is_told(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """It would make an object for each report, and add no header."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        await respond(send)

    on_report: Any = ServerTimingMiddleware
    await get(DBSessionMiddleware(app, running.database, on_report=on_report))
    assert "give its method `ServerTimingMiddleware.note`" in caplog.text
