"""Tests the promises with every driver and the options that `docs/how-to/drivers.md` gives."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import pgbouncer
import pytest
from anyio import to_thread
from asgi import Exchange, get, respond
from conftest import ENTRY, Running, becomes_true, real_database
from sqlalchemy import delete, select, text
from sqlalchemy.exc import DBAPIError
from test_cancellation import run_and_cancel

from asgi_dbsession import (
    AsyncDatabase,
    DatabaseUnavailable,
    DBSessionMiddleware,
    SyncDatabase,
    TransactionAborted,
)

pytestmark = pytest.mark.anyio

DOCS = Path(__file__).parents[1] / "docs" / "how-to" / "drivers.md"
# The names in the table: the kind of database, and if PgBouncer is used.
DRIVERS: dict[str, tuple[str, bool]] = {
    "asyncpg": ("asyncpg", False),
    "psycopg": ("psycopg", False),
    "psycopg (sync)": ("psycopg-sync", False),
    "asyncpg + PgBouncer": ("asyncpg", True),
    "psycopg + PgBouncer": ("psycopg", True),
    "asyncmy": ("asyncmy", False),
    "aiomysql": ("aiomysql", False),
    "PyMySQL": ("pymysql-sync", False),
    "aiosqlite": ("sqlite", False),
    "pysqlite": ("sqlite-sync", False),
}
WITH_A_SERVER = [name for name, (kind, _) in DRIVERS.items() if not kind.startswith("sqlite")]
driver_table = pytest.mark.matrix("Drivers", "driver")


@cache
def documented() -> dict[tuple[str, bool], AsyncDatabase | SyncDatabase]:
    """Return the databases of the page, by kind."""
    found: dict[tuple[str, bool], AsyncDatabase | SyncDatabase] = {}
    for block in re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE):
        namespace: dict[str, Any] = {"__name__": "pasted"}
        exec(compile(block, str(DOCS), "exec"), namespace)
        for each in namespace.values():
            if isinstance(each, AsyncDatabase | SyncDatabase):
                driver = each.url.get_driver_name().replace("pysqlite", "sqlite")
                kind = driver.removeprefix("aio") if "sqlite" in driver else driver
                if isinstance(each, SyncDatabase):
                    kind += "-sync"
                found[kind, each.url.host == "pgbouncer"] = each
    return found


def options_of(driver: str) -> dict[str, Any]:
    """Return the engine options that the page gives for this driver."""
    return dict(documented()[DRIVERS[driver]]._engine_options)


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Run the test with each driver."""
    name: str = request.param
    return name


@pytest.fixture
async def running(driver: str, tmp_path: Path) -> AsyncIterator[Running]:
    """A running database with the options of the page, checked after the test."""
    kind, bouncer = DRIVERS[driver]
    # PgBouncer keeps connections to its database, so other tests must not use it.
    real = real_database(kind, tmp_path, "bounced" if bouncer else "tests")
    real = replace(real, options=options_of(driver))
    if bouncer:
        real.url = pgbouncer.url_through(real.url)
    async with real.describe() as database:
        yield Running(real, database)
        await real.assert_clean(database)
    real.reader.dispose()


def serving(running: Running, handler: Callable[[], Any], status: int = 200) -> Any:
    """Wrap the middleware around a handler that responds with this status."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await handler()
        await respond(send, status)

    return DBSessionMiddleware(app, running.database)


@driver_table
async def test_a_read_sees_what_is_stored(running: Running) -> None:
    """A request reads rows."""
    seen = []

    async def write() -> None:
        await running.write("kept")

    async def read() -> None:
        seen.extend((await running.execute(select(ENTRY.c.note))).scalars())

    await get(serving(running, write))
    for _ in range(20):  # PgBouncer gives both clients the same server connection
        assert (await get(serving(running, read))).status == 200
    assert seen == ["kept"] * 20


@driver_table
async def test_a_write_is_stored_before_the_answer_leaves(running: Running) -> None:
    """A write is committed before the response is sent."""
    seen = []

    async def write() -> None:
        await running.write("kept")

    await get(serving(running, write, 201), on_message=lambda _: seen.append(running.stored()))
    assert seen == [["kept"], ["kept"]]


@driver_table
async def test_a_status_of_400_stores_nothing(running: Running) -> None:
    """A status of 400 or above rolls back."""

    async def write() -> None:
        await running.write("lost")

    assert (await get(serving(running, write, 400))).status == 400
    assert running.stored() == []


@driver_table
async def test_an_exception_stores_nothing(running: Running) -> None:
    """An exception rolls back."""

    async def write() -> None:
        await running.write("lost")
        raise LookupError

    exchange = await get(serving(running, write))
    assert isinstance(exchange.error, LookupError)
    assert running.stored() == []


@driver_table
async def test_a_commit_that_fails_is_not_answered(running: Running) -> None:
    """A failed COMMIT sends nothing, and does not disturb later requests."""

    async def doomed() -> None:
        await running.write("lost")
        await running.doom()

    async def write() -> None:
        await running.write("kept")

    exchange = await get(serving(running, doomed))
    assert exchange.messages == []
    assert isinstance(exchange.error, running.real.refusal)
    assert (await get(serving(running, write))).status == 200
    assert running.stored() == ["kept"]


@driver_table
async def test_a_cancelled_request_leaks_nothing(running: Running, driver: str) -> None:
    """A request cancelled at any await leaves no half-stored work and no open connection."""
    if DRIVERS[driver][1]:
        pytest.skip("PgBouncer 1.18 itself can end with `bad client state` at a cancel request")
    await cancel_at_every_await(running)


@pytest.mark.parametrize("driver", [name for name, (_, bouncer) in DRIVERS.items() if bouncer])
async def test_a_request_cancelled_behind_pgbouncer_leaks_nothing(running: Running) -> None:
    """Test PgBouncer separately: this test needs a version without the crash."""
    if pgbouncer.version()[:2] == (1, 18):
        pytest.skip("PgBouncer 1.18 itself can end with `bad client state` at a cancel request")
    await cancel_at_every_await(running)


async def cancel_at_every_await(running: Running) -> None:
    """Cancel requests at later and later steps, and check what was stored."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write(scope["path"] + " 1")
        await running.write(scope["path"] + " 2")
        await respond(send)

    middleware = DBSessionMiddleware(app, running.database)
    at, reached = 0, True
    while reached:
        at += 1
        exchange = Exchange(middleware, f"/{at}")
        reached, _ = await run_and_cancel(running, exchange, at, "native twice")
        await running.assert_clean()
        stored = [note for note in running.stored() if note.startswith(f"/{at} ")]
        assert stored in ([], [f"/{at} 1", f"/{at} 2"])
        assert stored or exchange.status is None
    assert at > 2
    assert stored


@driver_table
async def test_a_connection_killed_in_a_request_is_an_error_and_the_pool_heals(
    running: Running,
) -> None:
    """If a connection is killed during a request, the request fails and the pool recovers."""
    if running.real.is_sqlite:
        pytest.skip("SQLite has no server that could fail")

    async def killed() -> None:
        await running.write("lost")
        running.real.kill()

    async def write() -> None:
        await running.write("kept")

    exchange = await get(serving(running, killed))
    assert exchange.messages == []
    assert isinstance(exchange.error, DBAPIError)
    assert (await get(serving(running, write))).status == 200
    assert running.stored() == ["kept"]


@driver_table
async def test_a_connection_that_died_in_the_pool_is_replaced_unnoticed(running: Running) -> None:
    """A dead connection in the pool is replaced before a request uses it."""
    if running.real.is_sqlite:
        pytest.skip("SQLite has no server that could fail")

    async def write() -> None:
        await running.write("kept")

    await running.database.ping()
    running.real.kill()
    exchange = await get(serving(running, write))
    assert (exchange.status, exchange.error) == (200, None)
    assert running.stored() == ["kept"]


@driver_table
async def test_rows_are_streamed_in_a_response(running: Running) -> None:
    """Rows are streamed while the response is sent."""
    statement = select(ENTRY.c.note).order_by(ENTRY.c.id)
    notes = [f"{number}" for number in range(50)]

    async def rows() -> AsyncIterator[str]:
        if isinstance(running.database, AsyncDatabase):
            async for note in await running.database.get_session().stream_scalars(statement):
                yield note
            return
        result = await running.execute(statement.execution_options(yield_per=7))
        for note in await to_thread.run_sync(lambda: list(result.scalars())):
            yield note

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(ENTRY.insert().values([{"note": note} for note in notes]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async for note in rows():
            body = f"{note} ".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body"})

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.error is None
    assert exchange.body.decode().split() == notes


async def fail_in_a_savepoint(running: Running) -> None:
    """Run a statement that may fail."""
    wrong = text("SELECT * FROM no_such_table")
    session: Any = running.database.get_session()
    if isinstance(running.database, SyncDatabase):
        with pytest.raises(DBAPIError), session.begin_nested():
            session.execute(wrong)
    else:
        with pytest.raises(DBAPIError):
            async with session.begin_nested():
                await session.execute(wrong)


@driver_table
async def test_a_savepoint_saves_what_came_before(running: Running) -> None:
    """A failure in a savepoint does not affect other work."""

    async def write() -> None:
        await running.write("before")
        await fail_in_a_savepoint(running)
        await running.write("after")

    assert (await get(serving(running, write))).status == 200
    assert running.stored() == ["before", "after"]


@driver_table
async def test_a_swallowed_error_is_loud_or_harmless(running: Running) -> None:
    """If the handler catches an error that aborted the transaction, COMMIT raises an error."""

    async def swallow() -> None:
        await running.write("before")
        with pytest.raises(DBAPIError):
            await running.execute(text("SELECT * FROM no_such_table"))

    exchange = await get(serving(running, swallow))
    if running.real.is_postgresql:
        assert exchange.messages == []
        assert isinstance(exchange.error, TransactionAborted)
        assert running.stored() == []
    else:
        assert (exchange.status, exchange.error) == (200, None)
        assert running.stored() == ["before"]


# These ids are larger than any id of a sequence.
LEFT_AND_RIGHT = {"left": -1, "right": -2}


class Rival:
    """A transaction that locks the row "right", and later waits for the row "left"."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._wanting: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> Self:
        with self._running.real.reader.begin() as connection:
            connection.execute(
                ENTRY.insert().values([{"id": each} for each in LEFT_AND_RIGHT.values()])
            )
        engine = self._running.real.reader.execution_options(isolation_level="REPEATABLE READ")
        self._connection = engine.connect()
        # InnoDB keeps the transaction that has changed more rows; PostgreSQL keeps the one that
        # waits less.
        self._connection.execute(ENTRY.insert().values([{"id": -100 - n} for n in range(50)]))
        self._connection.execute(lock("right"))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._wanting is not None:
            await self._wanting
        self._connection.rollback()
        self._connection.close()

    async def deadlock(self) -> None:
        """Let the request wait for the row that the other transaction has locked."""
        if self._running.real.is_postgresql:
            await self._running.execute(text("SET LOCAL deadlock_timeout = '1ms'"))
        await self._running.execute(lock("left"))
        want = to_thread.run_sync(self._connection.execute, lock("left"))
        self._wanting = asyncio.ensure_future(want)
        await becomes_true(self._waits)
        await self._running.execute(lock("right"))

    def _waits(self) -> bool:
        query = (
            "SELECT variable_value > 0 FROM information_schema.global_status "
            "WHERE variable_name = 'Innodb_row_lock_current_waits'"
            if self._running.real.is_mariadb
            else "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        )
        with self._running.real.reader.connect() as connection:
            return bool(connection.scalar(text(query)))


def lock(row: str) -> Any:
    """Lock one row, and no neighbour rows."""
    return select(ENTRY).where(ENTRY.c.id == LEFT_AND_RIGHT[row]).with_for_update()


@driver_table
async def test_a_swallowed_deadlock_stores_no_half(running: Running) -> None:
    """If the handler catches a deadlock, its work is never stored by half."""
    if running.real.is_sqlite:
        pytest.skip("SQLite has one writer at a time")

    async def handler() -> None:
        await running.write("first half")
        with pytest.raises(DBAPIError, match=r"(?i)deadlock"):
            await rival.deadlock()
        with suppress(DBAPIError):  # PostgreSQL accepts no more statements
            await running.write("second half")

    async with Rival(running) as rival:
        exchange = await get(serving(running, handler, 201))
    assert exchange.messages == []
    assert isinstance(exchange.error, TransactionAborted)
    assert "eadlock" in str(exchange.error)
    assert not {"first half", "second half"} & set(running.stored())


@pytest.mark.parametrize("driver", ["asyncmy", "PyMySQL"], indirect=True)
async def test_no_savepoint_saves_anything_from_a_deadlock(running: Running) -> None:
    """InnoDB rolls back the whole transaction; the error says to do the work again."""

    async def handler() -> None:
        await running.write("first half")
        await running.execute(text("SAVEPOINT mine"))
        with pytest.raises(DBAPIError, match=r"(?i)deadlock"):
            await rival.deadlock()
        with pytest.raises(DBAPIError, match="SAVEPOINT mine does not exist"):
            await running.execute(text("ROLLBACK TO SAVEPOINT mine"))
        await running.write("second half")

    async def handler_of_the_session() -> None:
        await running.write("first half")
        session: Any = running.database.get_session()
        nested = await running.call("begin_nested") if session_blocks else session.begin_nested()
        if not session_blocks:
            await nested
        with pytest.raises(DBAPIError, match=r"(?i)deadlock"):
            await rival.deadlock()
        with pytest.raises(DBAPIError, match="does not exist"):
            await to_thread.run_sync(nested.rollback) if session_blocks else await nested.rollback()
        await running.write("second half")

    session_blocks = running.real.is_sync
    for each in (handler, handler_of_the_session):
        async with Rival(running) as rival:
            exchange = await get(serving(running, each, 201))
        assert exchange.messages == []
        assert isinstance(exchange.error, TransactionAborted)
        assert "do the whole work again" in str(exchange.error)
        assert not {"first half", "second half"} & set(running.stored())
        with running.real.reader.begin() as connection:
            connection.execute(delete(ENTRY))


@driver_table
async def test_after_a_rollback_a_deadlock_is_forgotten(running: Running) -> None:
    """After a deadlock and `rollback()`, the same request can do its work again."""
    if running.real.is_sqlite:
        pytest.skip("SQLite has one writer at a time")

    async def handler() -> None:
        with pytest.raises(DBAPIError, match=r"(?i)deadlock"):
            await rival.deadlock()
        await running.call("rollback")
        await running.write("again")

    async with Rival(running) as rival:
        exchange = await get(serving(running, handler, 201))
    assert (exchange.status, exchange.error) == (201, None)
    assert "again" in running.stored()


async def test_the_page_sets_a_time_limit_for_connecting() -> None:
    """With a connect timeout, an unreachable host fails the startup; each driver has its name."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as only_guest:
        only_guest.connect(full.getsockname())
        port: int = full.getsockname()[1]

        async def start(driver: str) -> None:
            told = documented()[DRIVERS[driver]]
            given = told._engine_options["connect_args"]
            shorter = {k: 2 for k in given if k in ("timeout", "connect_timeout")}
            options = told._engine_options | {"connect_args": given | shorter}
            url = told.url.set(host="127.0.0.1", port=port)
            with pytest.raises(DatabaseUnavailable, match="cannot be reached"):
                await type(told)(url, **options).startup()

        await asyncio.gather(*map(start, WITH_A_SERVER))


@pytest.mark.parametrize("driver", ["aiosqlite", "pysqlite"], indirect=True)
async def test_the_page_configures_sqlite(running: Running) -> None:
    """The options: write-ahead log, foreign keys, and waiting for another writer."""
    found = {}

    async def look() -> None:
        for pragma in ("journal_mode", "foreign_keys", "busy_timeout"):
            found[pragma] = (await running.execute(text(f"PRAGMA {pragma}"))).scalar()

    await get(serving(running, look))
    assert found == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 10_000}


@pytest.mark.parametrize("driver", ["asyncpg + PgBouncer"], indirect=True)
async def test_the_page_leaves_no_prepared_statement_behind_pgbouncer(running: Running) -> None:
    """Random names would create more and more statements on the server."""
    counted = []

    async def look() -> None:
        query = text("SELECT count(*) FROM pg_prepared_statements")
        counted.append((await running.execute(query)).scalar())

    for _ in range(20):
        await get(serving(running, look))
    assert counted == [0] * 20


def test_the_page_speaks_of_every_driver() -> None:
    """The page lists all tested drivers, and no others."""
    assert sorted(documented()) == sorted(DRIVERS.values())
