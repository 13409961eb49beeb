"""Tests that a forked child process uses its own connections."""

import asyncio
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from anyio import to_thread
from conftest import ENTRY, Running
from sqlalchemy import create_engine, event, func, select
from sqlalchemy.pool import QueuePool

from asgi_dbsession import NoSession, SyncDatabase

pytestmark = [
    pytest.mark.anyio,
    # This test must fork with threads, which Python 3.12 and later warn about.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

KINDS = ("sqlite-sync", "psycopg-sync", "pymysql-sync")
ASYNC = pytest.mark.parametrize("real", ["sqlite", "asyncpg", "psycopg"], indirect=True)


async def in_child(work: Callable[[], None]) -> None:
    """Run a function in the main thread of a forked process; fail if the function fails."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    _, status = await asyncio.wait_for(asyncio.to_thread(os.waitpid, pid, 0), 30)
    assert os.waitstatus_to_exitcode(status) == 0


def write(database: Any, note: str) -> None:
    """Store a row in a new unit of work."""
    with database.begin() as session:
        session.execute(ENTRY.insert().values(note=note))


async def test_a_pool_that_was_inherited_is_left_alone(running: Running) -> None:
    """Parent and child continue at the same time, each with its own connections."""
    database: Any = running.database
    await to_thread.run_sync(write, database, "before")
    inherited = database.engine.pool

    def child() -> None:
        assert database.engine.pool is not inherited
        for number in range(10):
            write(database, f"child {number}")

    await in_child(child)
    for number in range(10):
        await to_thread.run_sync(write, database, f"parent {number}")
    assert database.engine.pool is inherited
    assert len(running.stored()) == 21


@pytest.mark.parametrize("real", ["psycopg-sync", "pymysql-sync"], indirect=True)
async def test_a_pool_that_is_exhausted_is_not_waited_for(running: Running) -> None:
    """The parent process has all connections in use, and never returns them to the child."""
    async with running.real.describe(pool_size=1, max_overflow=0, pool_timeout=20) as database:
        engine: Any = database.engine
        held = engine.connect()
        await asyncio.wait_for(in_child(lambda: write(database, "child")), 10)
        held.close()
        await to_thread.run_sync(write, database, "parent")
    assert running.stored() == ["child", "parent"]


async def test_an_engine_of_the_applications_own_is_covered_too(running: Running) -> None:
    """Celery and RQ fork workers from a process that has imported the application."""
    engine = create_engine(running.database.url, poolclass=QueuePool)
    database = SyncDatabase.from_engine(engine)
    write(database, "parent")
    await in_child(lambda: write(database, "child"))
    write(database, "parent again")
    engine.dispose()
    assert running.stored() == ["parent", "child", "parent again"]


async def test_a_session_of_the_parent_process_is_not_current(running: Running) -> None:
    """A child that is forked inside a unit of work has no unit of work."""
    database: Any = running.database

    def child() -> None:
        with pytest.raises(NoSession):
            database.get_session()

    with database.begin() as session:
        session.execute(ENTRY.insert().values(note="parent"))
        await in_child(child)
    assert running.stored() == ["parent"]


async def test_a_health_check_that_runs_in_the_parent_is_not_awaited(running: Running) -> None:
    """No thread of the parent goes on in the child, so the child starts a check of its own."""
    database: Any = running.database
    has_begun = threading.Event()

    @event.listens_for(database.engine, "before_cursor_execute")
    def be_slow(*_: Any) -> None:
        has_begun.set()
        time.sleep(0.5)

    async def ask() -> None:
        assert (await database.health(within=10)).answers

    task = asyncio.create_task(ask())
    await asyncio.to_thread(has_begun.wait)
    await in_child(lambda: asyncio.run(ask()))
    await task


@ASYNC
async def test_an_async_database_is_started_again_in_the_child(running: Running) -> None:
    """The child starts the database in its own event loop; the parent's connections still work."""
    database: Any = running.database
    await _write(database, "before")

    async def main() -> None:
        async with database:
            await _write(database, "child")

    def child() -> None:
        assert not database.is_running
        asyncio.run(main())

    await in_child(child)
    await _write(database, "parent")
    assert running.stored() == ["before", "child", "parent"]


async def _write(database: Any, note: str) -> None:
    async with database.begin() as session:
        await session.execute(ENTRY.insert().values(note=note))


async def test_a_database_in_memory_keeps_its_rows() -> None:
    """Nothing is shared, because the child has a copy of the memory."""
    database = SyncDatabase("sqlite://")
    async with database:
        with database.begin() as session:
            ENTRY.create(session.connection())
        write(database, "before")

        def child() -> None:
            with database.begin() as session:
                assert session.scalar(select(func.count()).select_from(ENTRY)) == 1

        await in_child(child)
