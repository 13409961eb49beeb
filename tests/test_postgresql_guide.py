"""Tests the page on COPY, LISTEN/NOTIFY and advisory locks, directly and through PgBouncer."""

import asyncio
import importlib
import importlib.util
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pgbouncer
import pytest
from asgi import Exchange, Life, get, respond
from conftest import becomes_true, checked_out, postgresql
from pages import Page
from sqlalchemy import func, select
from test_guides import Guide

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/postgresql.md")
DRIVERS = ("asyncpg", "psycopg")
ROWS = [("attic", 7), ("cellar", 0)]
END_LISTENERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE query ILIKE 'LISTEN%' AND pid <> pg_backend_pid()"
)
EVERYWHERE = pytest.mark.parametrize("bouncer", [False, True], ids=["direct", "pgbouncer"])


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Each driver of PostgreSQL for asyncio."""
    return str(request.param)


@pytest.fixture
def bouncer() -> bool:
    """True if PgBouncer is used; a test may say so itself."""
    return False


@pytest.fixture
def guide(
    driver: str, bouncer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Guide]:
    """A folder to import from, and `DATABASE_URL` of a PostgreSQL database."""
    url = postgresql("guides")[0].set(drivername=f"postgresql+{driver}")
    if bouncer:
        url = pgbouncer.url_through(url)
        url = url.update_query_dict({"pgbouncer": "true"})
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = Guide(tmp_path)
    found.load(PAGE, "models")
    yield found
    found.close()


def load(name: str) -> Any:
    """Import another file of the page."""
    return importlib.import_module(name)


async def request(database: Any, work: Callable[[], Awaitable[object]], status: int = 200) -> Any:
    """Serve a request that does some work."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await work()
        await respond(send, status)

    return await get(DBSessionMiddleware(app, database))


async def add_measure(app: Any) -> Exchange:
    """Store a row by the route of the page, which notifies."""
    exchange = Exchange(app, "/measures", method="POST")
    exchange.scope["query_string"] = b"place=attic&value=7"
    return await exchange.run()


@EVERYWHERE
async def test_copied_rows_are_stored_with_the_request_or_not_at_all(
    guide: Guide, driver: str, bouncer: bool
) -> None:
    """COPY belongs to the transaction, even after a read without a transaction."""
    module, database = load(f"copy_{driver}"), load("models").database

    async def work() -> None:
        await get_session().scalars(select(load("models").Measure))
        await module.copy(ROWS)

    async with database:
        assert (await request(database, work, 409)).status == 409
        assert guide.stored("SELECT place FROM measure") == []
        assert (await request(database, work)).status == 200
        assert guide.stored("SELECT place FROM measure ORDER BY id") == ["attic", "cellar"]
        assert checked_out(database) == 0


async def test_copy_goes_on_after_an_error_inside_of_a_savepoint(guide: Guide, driver: str) -> None:
    """A caught error without a savepoint stores nothing, as the page warns."""
    module, database = load(f"copy_{driver}"), load("models").database

    async def caught() -> None:
        await module.copy(ROWS[:1])
        with pytest.raises(Exception, match="null value"):
            await module.copy([(None, 1)])

    async def with_a_savepoint() -> None:
        await module.copy(ROWS[:1])
        with pytest.raises(Exception, match="null value"):
            async with get_session().begin_nested():
                await module.copy([(None, 1)])

    async with database:
        assert (await request(database, caught)).status == 200
        assert guide.stored("SELECT place FROM measure") == []
        assert (await request(database, with_a_savepoint)).status == 200
        assert guide.stored("SELECT place FROM measure") == ["attic"]


@asynccontextmanager
async def listening(module: Any, received: Counter[str]) -> AsyncIterator[asyncio.Task[None]]:
    """Listen during the block, which begins when the generator says that it listens."""

    async def receive() -> None:
        async with aclosing(module.notifications("measure")) as notifications:
            async for payload in notifications:
                received[payload] += 1

    task = asyncio.create_task(receive())
    await becomes_true(lambda: task.done() or received[""] == 1)
    assert not task.done()
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_notification_comes_at_commit_and_after_no_rollback(
    guide: Guide, driver: str
) -> None:
    """The listener uses no connection of the requests, and reports the loss of its own."""
    received: Counter[str] = Counter()
    notify, listen = load("notify"), load(f"listen_{driver}")
    async with notify.database as database, listening(listen, received) as task:

        async def add() -> None:
            await get_session().execute(select(func.pg_notify("measure", "rolled back")))

        assert (await request(database, add, 409)).status == 409
        assert (await add_measure(notify.app)).status == 201
        await becomes_true(lambda: "attic" in received)
        assert "rolled back" not in received
        assert checked_out(database) == 0
        guide.execute(END_LISTENERS)
        await becomes_true(task.done)
        assert task.exception() is not None


@pytest.mark.parametrize("bouncer", [True], ids=["pgbouncer"])
async def test_a_notification_can_be_sent_through_pgbouncer_and_not_received(
    guide: Guide, driver: str, bouncer: bool
) -> None:
    """Each row of the table is true."""
    direct_url = postgresql("guides")[0].set(drivername=f"postgresql+{driver}")
    lost: Counter[str] = Counter()
    received: Counter[str] = Counter()
    notify, through = load("notify"), load(f"listen_{driver}")
    listen: Any = importlib.util.module_from_spec(through.__spec__)
    through.__spec__.loader.exec_module(listen)
    listen.direct = AsyncDatabase(direct_url)
    async with (
        notify.database,
        listening(listen, received),
        listening(through, lost) as task,
    ):
        for _ in range(6):  # PgBouncer has three connections
            assert (await add_measure(notify.app)).status == 201
        await becomes_true(lambda: received["attic"] == 6)
        assert "attic" not in lost
        assert not task.done()


@pytest.mark.parametrize("driver", ["asyncpg"], indirect=True)
async def test_a_cache_forgets_what_has_changed(guide: Guide, driver: str) -> None:
    """It forgets everything after its listener has lost its connection."""
    notify, cache = load("notify"), load("cache")
    cache.cache.update(attic=1)
    life = await Life(cache.app).startup()
    async with notify.database:
        await becomes_true(lambda: cache.cache == {})
        cache.cache.update(attic=1, cellar=2)
        assert (await add_measure(notify.app)).status == 201
        await becomes_true(lambda: cache.cache == {"cellar": 2})
        guide.execute(END_LISTENERS)
        await becomes_true(lambda: cache.cache == {})
        cache.cache.update(attic=1, cellar=2)
        assert (await add_measure(notify.app)).status == 201
        await becomes_true(lambda: cache.cache == {"cellar": 2})
    await life.shutdown()
    assert life.error is None


@EVERYWHERE
async def test_one_process_at_a_time_does_a_job(guide: Guide, driver: str, bouncer: bool) -> None:
    """The lock is free again after COMMIT and after ROLLBACK."""
    report, database = load("report"), load("models").database
    guide.execute("INSERT INTO measure VALUES (1, 'attic', 0), (2, 'cellar', 7)")
    async with database:
        with postgresql("guides")[1].connect() as other:
            other.execute(select(func.pg_advisory_xact_lock(report.LOCK)))
            assert await report.forget_zeros() is False
        assert await report.forget_zeros() is True
        assert guide.stored("SELECT place FROM measure") == ["cellar"]
        assert await report.forget_zeros() is True


async def test_a_lock_of_a_session_stays_with_the_pool(guide: Guide, driver: str) -> None:
    """As the page warns, the lock survives ROLLBACK, and is released with its connection."""
    database = load("models").database

    async def lock() -> None:
        await get_session().execute(select(func.pg_advisory_lock(7)))

    # This lock ends with its transaction, so the test itself keeps no lock.
    try_lock = "SELECT pg_try_advisory_xact_lock(7)"
    async with database:
        await request(database, lock, 409)
        assert guide.stored(try_lock) == [False]
    await becomes_true(lambda: guide.stored(try_lock) == [True])
