"""Tests the warning about idle connections and the lines of code that it names."""

import asyncio
import inspect
import logging
import time
from typing import Any

import pytest
from anyio import to_thread
from asgi import get, respond
from conftest import ENTRY, Running
from sqlalchemy import select

from asgi_dbsession import ConfigurationError, DBSessionMiddleware, SyncDatabase, warn_when_idle

pytestmark = pytest.mark.anyio

KINDS = ("sqlite", "asyncpg", "psycopg-sync")


async def work(running: Running, places: list[int]) -> None:
    """Run a statement, do something else for a while, and run another statement."""
    session: Any = running.database.get_session()

    def blocking() -> None:
        line = inspect.stack()[0].lineno
        session.execute(select(ENTRY))
        time.sleep(0.1)
        session.execute(select(ENTRY))
        places.extend([line + 1, line + 3])

    if isinstance(running.database, SyncDatabase):
        await to_thread.run_sync(blocking)
        return
    line = inspect.stack()[0].lineno
    await session.execute(select(ENTRY))
    await asyncio.sleep(0.1)
    await session.execute(select(ENTRY))
    places.extend([line + 1, line + 3])


async def test_an_idle_connection_is_warned_of(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning names the request, the database, the duration and the two lines."""
    places: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await work(running, places)
        await respond(send)

    with caplog.at_level(logging.WARNING, "asgi_dbsession"):
        served = DBSessionMiddleware(app, running.database, on_report=warn_when_idle(0.1))
        await get(served, "/slow")
    (message,) = caplog.messages
    assert message.startswith(f"GET /slow held a connection of {running.database} idle for 0.")
    assert "between {0}:{1} and {0}:{2}".format(__file__, *places) in message


async def test_below_the_threshold_nothing_is_said(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no warning about a request that returns its connection before it waits."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            await work(running, [])
        else:
            await running.execute(select(ENTRY))
            await running.call("commit")
            await asyncio.sleep(0.1)
            await running.execute(select(ENTRY))
        await respond(send)

    with caplog.at_level(logging.WARNING, "asgi_dbsession"):
        await get(DBSessionMiddleware(app, running.database, on_report=warn_when_idle(60)), "/slow")
        await get(
            DBSessionMiddleware(app, running.database, on_report=warn_when_idle(0.1)), "/quick"
        )
    assert caplog.messages == []


@pytest.mark.parametrize("real", ["sqlite", "asyncpg"], indirect=True)
async def test_a_task_that_outlived_its_request_is_warned_of_too(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """A task after its request has no path, so the warning says what it is."""
    database: Any = running.database
    ended = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def outlive() -> None:
        await ended.wait()
        async with database.begin():
            await work(running, [])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(asyncio.create_task(outlive()))
        await respond(send)

    with caplog.at_level(logging.WARNING, "asgi_dbsession"):
        await get(DBSessionMiddleware(app, running.database, on_report=warn_when_idle(0.1)))
        ended.set()
        await asyncio.gather(*tasks)
    (message,) = caplog.messages
    assert message.startswith("A task that outlived its request held a connection of")


@pytest.mark.parametrize("wrong", [-1, "x", None, True, float("nan"), print], ids=repr)
def test_seconds_that_are_none_are_refused(wrong: Any) -> None:
    """A negative number would warn about each request; a text would fail at each report."""
    with pytest.raises(ConfigurationError, match="takes a number of seconds, 0 or more, not"):
        warn_when_idle(wrong)


async def test_the_function_itself_as_on_report_is_told(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the parentheses, it would get the report for its seconds and never warn."""
    places: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await work(running, places)
        await respond(send)

    on_report: Any = warn_when_idle
    await get(DBSessionMiddleware(app, running.database, on_report=on_report), "/")
    assert "warn_when_idle takes a number of seconds" in caplog.text
