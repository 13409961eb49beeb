"""A health check answers in time in every situation, and never raises."""

import asyncio
import dataclasses
import json
import socket
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from threading import Thread
from typing import Any

import anyio
import pytest
from anyio import CancelScope
from conftest import ENTRY, Running, becomes_true, checked_out
from sqlalchemy import event, select
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from asgi_dbsession import AsyncDatabase, Health, SyncDatabase

pytestmark = pytest.mark.anyio

KINDS = ("sqlite", "asyncpg", "psycopg", "psycopg-sync")
AnyDatabase = AsyncDatabase[Any] | SyncDatabase[Any]


@contextmanager
def silent_server() -> Iterator[int]:
    """A port that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def described(kind: str, port: int) -> AnyDatabase:
    """A database at this address, with a password, which need not answer."""
    url = f"postgresql://app:s3cret@127.0.0.1:{port}/shop"
    if kind == "psycopg-sync":
        return SyncDatabase(url, ping_on_startup=False, connect_args={"connect_timeout": 2})
    return AsyncDatabase(url.replace(":", f"+{kind}:", 1), ping_on_startup=False)


async def test_a_database_that_answers_is_well(running: Running) -> None:
    """The result has the duration and the state of the pool, and can be written as JSON."""
    health = await running.database.health(within=30)
    assert (health.answers, health.reason) == (True, None)
    assert health.latency is not None
    assert 0 < health.latency < 30
    pool: Any = running.database.engine.pool
    assert (health.pool_size, health.checked_out, health.overflow) == (pool.size(), 0, 0)
    written = json.loads(json.dumps(dataclasses.asdict(health)))
    assert Health(**written | {"replicas": tuple(written["replicas"])}) == health


async def test_an_exhausted_pool_is_told_in_time(running: Running) -> None:
    """The result shows the pool and comes before the pool's time-out; later the check succeeds."""
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 1, "pool_timeout": 600}
    async with running.real.describe(**options) as database, AsyncExitStack() as held:
        if isinstance(database, SyncDatabase):
            with ExitStack() as held_too:
                for _ in range(2):
                    held_too.enter_context(database.begin()).execute(select(ENTRY))
                found = [await database.health(within=0.05) for _ in range(5)]
        else:
            for _ in range(2):
                session = await held.enter_async_context(database.begin())
                await session.execute(select(ENTRY))
            found = [await database.health(within=0.05) for _ in range(5)]
            await held.aclose()
        assert {each.answers for each in found} == {False}
        assert found[0].reason == f"{database} did not answer within 0.05 s"
        assert (found[0].pool_size, found[0].checked_out, found[0].overflow) == (1, 2, 1)
        # The checks in threads still have to get their connections and to return them.
        await becomes_true(lambda: checked_out(database) == 0)
        async with asyncio.timeout(10):
            while not (await database.health(within=30)).answers:
                await asyncio.sleep(0.01)


DRIVERS = pytest.mark.parametrize("kind", ["asyncpg", "psycopg", "psycopg-sync"])


@DRIVERS
async def test_a_server_that_is_not_there_is_told(kind: str) -> None:
    """The result has the driver's reason, without the password."""
    with silent_server() as port:
        pass
    async with described(kind, port) as database:
        health = await database.health(within=30)
    assert (health.answers, health.latency, health.checked_out) == (False, None, 0)
    assert health.reason is not None
    assert "cannot be reached" in health.reason
    assert "s3cret" not in repr(health)


@DRIVERS
async def test_a_server_that_says_nothing_is_told_in_time(kind: str) -> None:
    """The server accepts connections but never answers; many checks open few connections."""
    with silent_server() as port:
        async with described(kind, port) as database:
            found = [await database.health(within=0.05) for _ in range(5)]
            assert {each.answers for each in found} == {False}
            assert "s3cret" not in repr(found)
            assert checked_out(database) <= 3
            await becomes_true(lambda: checked_out(database) == 0)


async def test_a_question_that_is_cancelled_leaves_nothing(running: Running) -> None:
    """The client of the health route disconnects."""
    before = asyncio.all_tasks()
    task = asyncio.create_task(running.database.health(within=30))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled() or task.result().answers  # a thread may have asked already
    assert (await running.database.health(within=30)).answers  # the same check, in a thread
    # A cancelled check may take a connection out of the pool before it ends.
    await becomes_true(lambda: asyncio.all_tasks() == before)
    await becomes_true(lambda: checked_out(running.database) == 0)


# aiosqlite leaves a connection open if its opening is cancelled, and Python 3.13 warns about it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("steps", [1, 2, 3])
async def test_questions_of_callers_that_are_cancelled_do_no_harm(
    running: Running, steps: int
) -> None:
    """Disconnecting clients, early or late, do not make a healthy database look unhealthy."""
    before = asyncio.all_tasks()
    for _ in range(10):
        task = asyncio.create_task(running.database.health(within=30))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        with CancelScope() as scope:
            scope.cancel()
            await running.database.health(within=30)
    assert (await running.database.health(within=30)).answers
    await becomes_true(lambda: asyncio.all_tasks() == before)
    await becomes_true(lambda: checked_out(running.database) == 0)


def slow_down(database: AnyDatabase, seconds: list[float]) -> list[str | None]:
    """Make each statement slow, and record the value of `CALLER` in each."""
    asked: list[str | None] = []
    engine: Any = database.engine

    @event.listens_for(getattr(engine, "sync_engine", engine), "before_cursor_execute")
    def be_far_away(*_: Any) -> None:
        asked.append(CALLER.get())
        if isinstance(database, SyncDatabase):
            time.sleep(seconds[0])
        else:
            await_only(asyncio.sleep(seconds[0]))

    return asked


CALLER: ContextVar[str | None] = ContextVar("caller", default=None)


async def test_callers_share_the_question_that_is_under_way(running: Running) -> None:
    """Parallel checks send one statement; a later check sends a new one."""
    asked = slow_down(running.database, [0.05])
    CALLER.set("a request")
    for _ in range(2):
        found = await asyncio.gather(*(running.database.health(within=30) for _ in range(50)))
        assert [each.answers for each in found] == [True] * 50
    assert asked == [None, None]  # without the context of a request


async def test_callers_share_an_error_too(running: Running) -> None:
    """Each caller gets the reason."""
    engine: Any = running.database.engine

    @event.listens_for(getattr(engine, "sync_engine", engine), "before_cursor_execute")
    def fail(*_: Any) -> None:
        raise LookupError("no coffee")

    found = await asyncio.gather(*(running.database.health(within=30) for _ in range(5)))
    assert [each.answers for each in found] == [False] * 5
    assert all("no coffee" in str(each.reason) for each in found)


async def test_a_question_that_was_given_up_is_not_shared(running: Running) -> None:
    """A check after a failed check finds out if the database answers again."""
    seconds = [0.5]
    asked = slow_down(running.database, seconds)
    patient = asyncio.create_task(running.database.health(within=30))
    await asyncio.sleep(0.05)
    assert not (await running.database.health(within=0.05)).answers
    seconds[0] = 0
    assert (await running.database.health(within=30)).answers
    assert len(asked) == 2
    assert (await patient).answers  # the check continues for callers with more time


@pytest.mark.parametrize("real", ["sqlite-sync", "psycopg-sync"], indirect=True)
async def test_only_a_few_questions_are_given_up(running: Running) -> None:
    """Few threads wait for a dead server; after they end, new checks are possible."""
    asked = slow_down(running.database, [0.5])
    found = [await running.database.health(within=0.01) for _ in range(6)]
    assert {each.answers for each in found} == {False}
    await becomes_true(lambda: len(asked) == 3)
    await becomes_true(lambda: checked_out(running.database) == 0)
    await asyncio.sleep(0.05)
    assert (await running.database.health(within=30)).answers
    assert len(asked) == 4


def test_callers_of_several_event_loops_share_a_question(tmp_path: Path) -> None:
    """Checks run on asyncio and trio at the same time, each in its own thread."""
    database = SyncDatabase(f"sqlite:///{tmp_path / 'shop.db'}")
    asyncio.run(database.startup())
    asked = slow_down(database, [0.5])
    found: list[Health] = []

    async def ask() -> None:
        found.append(await database.health(within=30))

    threads = [
        Thread(target=anyio.run, args=(ask,), kwargs={"backend": each})
        for each in ("asyncio", "trio") * 3
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert [each.answers for each in found] == [True] * 6
    assert asked == [None]
    asyncio.run(database.shutdown())


@DRIVERS
async def test_a_database_that_is_not_running_is_not_well(kind: str) -> None:
    """The error says what to do."""
    health = await described(kind, 1).health()
    assert (health.answers, health.pool_size) == (False, None)
    assert health.reason is not None
    assert "is not running" in health.reason


async def test_a_pool_that_does_not_count_has_no_numbers(running: Running) -> None:
    """Everything else works as before."""
    async with running.real.describe(poolclass=NullPool) as database:
        health = await database.health(within=30)
    assert (health.answers, health.pool_size, health.checked_out) == (True, None, None)
