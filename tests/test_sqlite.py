"""Tests that SQLite rolls back whatever a unit of work has written, as the other databases do."""

import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread
from asgi import get, respond
from conftest import CHILD, ENTRY, AnyDatabase, Real, Running, checked_out
from sqlalchemy import (
    Engine,
    Executable,
    create_engine,
    delete,
    event,
    insert,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.schema import DropTable

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DBSessionMiddleware,
    PrematureClose,
    SyncDatabase,
    TransactionAborted,
)

pytestmark = pytest.mark.anyio
KINDS = ("sqlite", "sqlite-sync")

BEFORE = ("one", "two")
ONE = select(ENTRY.c.id).where(ENTRY.c.note == "one").cte("one")
NEW = select(literal("new").label("note")).cte("new")
WRITES: dict[str, Executable] = {
    "INSERT from a CTE": insert(ENTRY).from_select(["note"], select(NEW.c.note)),
    "UPDATE with a CTE": update(ENTRY).where(ENTRY.c.id.in_(select(ONE.c.id))).values(note="new"),
    "DELETE with a CTE": delete(ENTRY).where(ENTRY.c.id.in_(select(ONE.c.id))),
    "text": text("WITH new(note) AS (SELECT 'new') INSERT INTO entry (note) SELECT note FROM new"),
    "text after comments": text(
        "-- one\n /* two */ WITH new(note) AS (SELECT 'new') "
        "INSERT INTO entry (note) SELECT note FROM new"
    ),
    "text in lower case": text(
        "with new(note) as (select 'new') replace into entry select 1, note from new"
    ),
    "text after a semicolon": text(";INSERT INTO entry (note) VALUES ('new')"),
    "text of REPLACE": text("REPLACE INTO entry (id, note) VALUES (1, 'new')"),
    "CREATE TABLE": text("CREATE TABLE made (id INTEGER)"),
    "CREATE TABLE AS": text("CREATE TABLE made AS SELECT * FROM entry"),
    "CREATE INDEX": text("CREATE INDEX made ON entry (note)"),
    "DROP TABLE": DropTable(CHILD),
    "ALTER TABLE": text("ALTER TABLE entry RENAME TO renamed"),
}


def stored(real: Real) -> list[Any]:
    """Return everything that is stored, the schema included."""
    with sqlite3.connect(str(real.url.database)) as connection:
        schema = connection.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall()
        names = connection.execute(
            "SELECT name FROM sqlite_master WHERE name IN ('entry', 'renamed')"
        )
        rows = connection.execute(f"SELECT * FROM {names.fetchone()[0]}").fetchall()
    connection.close()
    return [*schema, *rows]


@pytest.fixture
async def running(real: Real) -> AsyncIterator[Running]:
    """A running database with two rows."""
    with real.reader.begin() as connection:
        connection.execute(insert(ENTRY), [{"note": note} for note in BEFORE])
    database = real.describe()
    async with database:
        running = Running(real, database)
        yield running
        await running.assert_clean()


def borrowed(real: Real, begin: str | None, execute: Any = None) -> AnyDatabase:
    """An engine of the application, whose own listeners begin each transaction, or execute."""

    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    database = from_engine(real, pool_events=[(configure, "connect")])
    engine: Any = database.engine
    sync_engine: Engine = getattr(engine, "sync_engine", engine)
    if execute is not None:
        event.listen(sync_engine, "do_execute", execute)
    if begin is not None:
        event.listen(sync_engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return database


def from_engine(real: Real, **options: Any) -> AnyDatabase:
    """Make an engine as an application does, and describe the database with this engine."""
    make: Callable[..., Any] = create_engine if real.is_sync else create_async_engine
    driver = "pysqlite" if real.is_sync else "aiosqlite"
    engine = make(real.url.set(drivername=f"sqlite+{driver}"), **options)
    database_class: Any = SyncDatabase if real.is_sync else AsyncDatabase
    database: AnyDatabase = database_class.from_engine(engine)
    return database


async def dispose(database: AnyDatabase) -> None:
    """Close the connections of an engine that the application has made."""
    if isinstance(database, AsyncDatabase):
        await database.engine.dispose()
    else:
        database.engine.dispose()


@pytest.mark.parametrize("status", [201, 409])
@pytest.mark.parametrize("write", WRITES)
async def test_the_status_decides_about_each_kind_of_write(
    running: Running, write: str, status: int
) -> None:
    """Python's driver sends BEGIN only before INSERT, UPDATE, DELETE and REPLACE."""
    await check_that_the_status_decides(running, write, status)


async def check_that_the_status_decides(running: Running, write: str, status: int) -> None:
    """Check that a write is stored with the status 201, and rolled back with 409."""
    before = stored(running.real)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(WRITES[write])
        await respond(send, status)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (status, None)
    assert (stored(running.real) == before) is (status == 409)


async def test_a_savepoint_written_as_sql_is_inside_of_a_transaction(running: Running) -> None:
    """Without BEGIN, the RELEASE of the savepoint would be a COMMIT."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(text("SAVEPOINT mine"))
        await running.write("three")
        await running.execute(text("RELEASE mine"))
        await respond(send, 409)

    assert (await get(DBSessionMiddleware(app, running.database))).status == 409
    assert running.stored() == list(BEFORE)


async def test_begin_locks_as_the_driver_is_told(real: Real) -> None:
    """`isolation_level` of the driver says which lock BEGIN takes."""
    database = real.describe(connect_args={"isolation_level": "IMMEDIATE"})
    running = Running(real, database)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(text("SAVEPOINT mine"))
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        await respond(send, 200)

    other = sqlite3.connect(str(real.url.database), isolation_level=None, timeout=0)
    async with database:
        assert (await get(DBSessionMiddleware(app, database))).error is None
    other.close()


async def test_a_write_on_the_connection_of_the_session_is_rolled_back(running: Running) -> None:
    """`session.connection()` takes part in the unit of work."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        connection = await running.call("connection")
        found = connection.exec_driver_sql("CREATE TABLE made (id INTEGER)")
        if not running.real.is_sync:
            await found
        await respond(send, 409)

    before = stored(running.real)
    assert (await get(DBSessionMiddleware(app, running.database))).status == 409
    assert stored(running.real) == before


async def test_an_engine_in_binds_begins_too(real: Real, tmp_path: Path) -> None:
    """A session may use several engines, each of which the package meets at its first use."""
    make: Callable[..., Any] = create_engine if real.is_sync else create_async_engine
    engine = make(real.url.set(drivername=f"sqlite+{'pysqlite' if real.is_sync else 'aiosqlite'}"))
    database = real.describe(session_options={"binds": {ENTRY: engine}})
    database.url = real.url.set(
        drivername=database.url.drivername, database=str(tmp_path / "other.db")
    )
    running = Running(real, database)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(WRITES["INSERT from a CTE"])
        await respond(send, 409)

    async with database:
        assert (await get(DBSessionMiddleware(app, database))).status == 409
    assert running.stored() == []
    await (to_thread.run_sync(engine.dispose) if real.is_sync else engine.dispose())


async def test_a_retry_repeats_no_write(running: Running) -> None:
    """The attempt that met a conflict has stored nothing."""
    runs: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(len(runs))
        await running.execute(WRITES["text"])
        if len(runs) == 1:
            raise LookupError
        await respond(send, 201)

    app_twice = DBSessionMiddleware(app, running.database, attempts=2, retry_on=LookupError)
    exchange = await get(app_twice)
    assert (exchange.status, len(runs)) == (201, 2)
    assert running.stored() == [*BEFORE, "new"]


@pytest.mark.parametrize(
    "read",
    [
        text("SELECT note FROM entry"),
        text("/* a comment */ VALUES ((SELECT count(*) FROM entry))"),
        text("EXPLAIN SELECT note FROM entry"),
        text("WITH one AS (SELECT note AS last_update FROM entry) SELECT last_update FROM one"),
        select(ONE.c.id),
        select(ENTRY.c.note),
    ],
    ids=str,
)
async def test_a_read_begins_no_transaction(running: Running, read: Executable) -> None:
    """A reader keeps no lock, so a write of another connection is seen, and can be followed."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        (await running.execute(read)).all()
        with running.real.reader.begin() as connection:
            connection.execute(insert(ENTRY).values(note="other"))
        await running.write("three")
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (201, None)
    assert running.stored() == [*BEFORE, "other", "three"]


async def test_statements_that_sqlite_refuses_in_a_transaction_begin_none(
    running: Running,
) -> None:
    """VACUUM, and a PRAGMA that a transaction would make ineffective."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(text("VACUUM"))
        await running.execute(text("PRAGMA foreign_keys = OFF"))
        found = await running.execute(text("PRAGMA foreign_keys"))
        await running.execute(text("PRAGMA foreign_keys = ON"))
        await running.execute(text("ATTACH ':memory:' AS other"))
        await running.execute(text("DETACH other"))
        await respond(send, 200, str(found.scalar_one()).encode())

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.body, exchange.error) == (200, b"0", None)


@pytest.mark.parametrize(
    "pragma", ["user_version = {}", "main.application_id({})", "schema.user_version={}"]
)
async def test_a_number_in_the_header_of_the_file_is_rolled_back(
    running: Running, pragma: str
) -> None:
    """Applications keep the version of their schema in it, and a transaction includes it."""
    name = "user_version" if "user" in pragma else "application_id"
    engine = running.real.reader
    for status, number in ((201, 1), (500, 2)):
        statement = f"/* one */ PRAGMA {pragma.format(number).replace('schema.', 'main . ')}"

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await running.execute(text(statement))  # noqa: B023
            await respond(send, status)  # noqa: B023

        exchange = await get(DBSessionMiddleware(app, running.database))
        assert (exchange.status, exchange.error) == (status, None)
        with engine.connect() as connection:
            assert connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() == 1


async def test_the_applications_own_connections_stay_as_they_are(running: Running) -> None:
    """The driver alone decides about `engine.connect()`, which is no unit of work."""
    if isinstance(running.database, AsyncDatabase):
        async with running.database.engine.connect() as connection:
            await connection.execute(text("CREATE TABLE made (id INTEGER)"))
    else:
        with running.database.engine.connect() as blocking:
            blocking.execute(text("CREATE TABLE made (id INTEGER)"))
    assert "made" in str(stored(running.real))


@pytest.mark.parametrize("begin", [None, "BEGIN IMMEDIATE"])
async def test_the_applications_own_listener_for_begin_is_respected(
    real: Real, begin: str | None
) -> None:
    """`isolation_level = None` is autocommit, unless a listener of the application begins."""
    database = borrowed(real, begin)
    running = Running(real, database)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(WRITES["text"])
        await respond(send, 409)

    exchange = await get(DBSessionMiddleware(app, database))
    assert (exchange.status, exchange.error) == (409, None)
    assert running.stored() == ([] if begin else ["new"])
    await dispose(database)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 added `autocommit`")
@pytest.mark.parametrize("switch", ["connect_args", "an event of the pool"])
@pytest.mark.parametrize("write", ["text", "text of REPLACE"])
async def test_autocommit_of_the_driver_is_refused_before_a_write_is_lost(
    real: Real, write: str, switch: str
) -> None:
    """The driver's `commit()` does nothing then, so a transaction would never be committed."""
    if switch == "connect_args":
        database = from_engine(real, connect_args={"autocommit": True})
    else:
        database = from_engine(real, pool_events=[(switch_autocommit_on, "connect")])
    running = Running(real, database)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(WRITES[write])
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.status is None
    with pytest.raises(ConfigurationError, match='isolation_level="AUTOCOMMIT"'):
        raise exchange.error or AssertionError
    assert (real.stored(), checked_out(running.database)) == ([], 0)
    await dispose(running.database)


def switch_autocommit_on(connection: Any, _record: Any) -> None:
    """Do what an application may do with each new connection of the driver."""
    driver = getattr(connection, "driver_connection", connection)
    getattr(driver, "_conn", driver).autocommit = True


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 added `autocommit`")
@pytest.mark.parametrize("status", [201, 409])
@pytest.mark.parametrize("write", WRITES)
async def test_the_driver_may_begin_each_transaction(real: Real, write: str, status: int) -> None:
    """With `autocommit=False`, a transaction is always open, so this package sends no BEGIN."""
    with real.reader.begin() as connection:
        connection.execute(insert(ENTRY), [{"note": note} for note in BEFORE])
    database = real.describe(connect_args={"autocommit": False}, pool_events=[])
    async with database:
        running = Running(real, database)
        await check_that_the_status_decides(running, write, status)
        await running.assert_clean()


UPSET = {
    "OR ROLLBACK": "INSERT OR ROLLBACK INTO entry (note) VALUES ('three')",
    "a trigger": "INSERT INTO entry (note) VALUES ('bad')",
}


async def swallow(running: Running, statement: str) -> None:
    """Write, catch an error at which SQLite rolls back the whole transaction, and write again."""
    await running.write("three")
    with suppress(DBAPIError):
        await running.execute(text(statement))
    await running.write("four")


@pytest.mark.parametrize("status", [201, 409])
@pytest.mark.parametrize("engine", ["own", "borrowed"])
@pytest.mark.parametrize("upset", UPSET)
async def test_a_swallowed_error_that_rolled_back_stores_no_half(
    real: Real, upset: str, engine: str, status: int
) -> None:
    """SQLite has rolled back the first half, so the second half must not be stored."""
    with real.reader.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER refuse BEFORE INSERT ON entry WHEN new.note = 'bad' "
            "BEGIN SELECT RAISE(ROLLBACK, 'refused'); END"
        )
    database = real.describe() if engine == "own" else borrowed(real, "BEGIN")
    running = Running(real, database)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await swallow(running, UPSET[upset])
        await respond(send, status)

    async with database:
        exchange = await get(DBSessionMiddleware(app, database))
        assert checked_out(database) == 0
    if status == 201:
        assert isinstance(exchange.error, TransactionAborted)
        assert "rolled back the transaction" in str(exchange.error)
        assert exchange.messages == []
    else:
        assert (exchange.status, exchange.error) == (409, None)
    assert running.stored() == []
    await dispose(database) if engine == "borrowed" else None


async def test_a_listener_that_executes_the_statements_hides_no_error(real: Real) -> None:
    """SQLAlchemy calls no listener of `do_execute` after one that returns True."""

    def execute(cursor: Any, statement: str, parameters: Any, _context: Any) -> bool:
        cursor.execute(statement, parameters)
        return True

    database = borrowed(real, "BEGIN", execute)
    running = Running(real, database)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await swallow(running, UPSET["OR ROLLBACK"])
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, database))
    assert isinstance(exchange.error, TransactionAborted)
    assert (exchange.messages, running.stored()) == ([], [])
    await dispose(database)


async def test_a_close_after_an_error_that_rolled_back_is_no_success(running: Running) -> None:
    """The work is lost before the close, so the close finds no open transaction."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("three")
        try:
            await running.execute(text(UPSET["OR ROLLBACK"]))
        except DBAPIError:
            closing = running.database.get_session().close()
            if closing is not None:
                await closing
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert isinstance(exchange.error, PrematureClose)
    assert (exchange.messages, running.stored()) == ([], list(BEFORE))


async def test_a_swallowed_error_in_a_savepoint_that_rolled_back_everything(
    running: Running,
) -> None:
    """The savepoint is gone too, together with the work before it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("three")
        session: Any = running.database.get_session()
        with suppress(DBAPIError):
            if running.real.is_sync:
                with session.begin_nested():
                    session.execute(text(UPSET["OR ROLLBACK"]))
            else:
                async with session.begin_nested():
                    await session.execute(text(UPSET["OR ROLLBACK"]))
        await running.write("four")
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert isinstance(exchange.error, TransactionAborted)
    assert running.stored() == list(BEFORE)


async def test_an_error_that_found_no_work_to_roll_back_may_be_swallowed(running: Running) -> None:
    """A first statement that fails loses nothing, and a rollback makes a new start."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with suppress(DBAPIError):
            await running.execute(text("INSERT OR ROLLBACK INTO entry (note) VALUES ('one')"))
        await swallow(running, UPSET["OR ROLLBACK"])
        await running.call("rollback")
        await running.write("five")
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (201, None)
    assert running.stored() == [*BEFORE, "five"]


async def test_an_error_that_rolled_back_one_statement_may_be_swallowed(running: Running) -> None:
    """Most errors of SQLite undo their statement alone."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("three")
        with suppress(DBAPIError):
            await running.write("three")
        await running.write("four")
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (201, None)
    assert running.stored() == [*BEFORE, "three", "four"]


@pytest.mark.parametrize("rolls_back", [True, False])
@pytest.mark.parametrize("how", ["close", "with"])
async def test_a_close_after_a_failed_commit_leaves_nothing_to_the_next_request(
    real: Real, how: str, *, rolls_back: bool
) -> None:
    """SQLite keeps the transaction of a failed COMMIT open, and SQLAlchemy does not know it.

    The ROLLBACK after the failed COMMIT may fail too.
    """

    class Driver(sqlite3.Connection):
        """A connection whose first ROLLBACK in the first request fails."""

        def rollback(self) -> None:
            if failures:
                raise failures.pop()
            super().rollback()

    failures: list[Exception] = []

    async def fail(running: Running) -> None:
        await running.write("undone")
        if not rolls_back:
            failures.append(sqlite3.OperationalError("disk I/O error"))
        with pytest.raises(OperationalError, match="locked"):
            await running.call("commit")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        running = Running(real, database)
        session: Any = database.get_session()
        if scope["path"] == "/next":
            await running.write("kept")
            await respond(send)
            return
        try:
            if how == "close":
                await fail(running)
            elif real.is_sync:
                with session:
                    await fail(running)
                    raise LookupError
            else:
                async with session:
                    await fail(running)
                    raise LookupError
            raise LookupError
        except LookupError:
            closing = session.close()
            if closing is not None:
                await closing
        await respond(send, 409)

    async with real.describe(connect_args={"timeout": 0, "factory": Driver}) as database:
        middleware = DBSessionMiddleware(app, database)
        with real.reader.connect() as reading:
            # COMMIT has to wait until this transaction, which has read, ends.
            reading.exec_driver_sql("BEGIN")
            reading.execute(select(ENTRY))
            assert (await get(middleware)).status == 409
        assert real.open_transactions() == 0
        assert (await get(middleware, "/next")).status == 200
    assert real.stored() == ["kept"]


@pytest.mark.parametrize("earlier", ["nothing", "a read", "a write"])
async def test_a_driver_connection_that_was_closed_is_replaced(real: Real, earlier: str) -> None:
    """The request that finds the closed connection fails, and the pool opens another one."""
    opened: list[Any] = []

    async def close_driver() -> None:
        closing = opened[-1].close()
        if closing is not None:
            await closing

    async def app(scope: Any, receive: Any, send: Any) -> None:
        running = Running(real, database)
        if scope["path"] == "/fails" and earlier != "nothing":
            await running.execute(select(ENTRY))
            await running.write("lost") if earlier == "a write" else None
            await close_driver()
        await running.write(scope["path"])
        await respond(send)

    async with real.describe(pool_size=1, max_overflow=0, pool_timeout=2) as database:
        event.listen(
            getattr(database.engine, "sync_engine", database.engine),
            "checkout",
            lambda _connection, record, _proxy: opened.append(record.driver_connection),
        )
        assert (await get(DBSessionMiddleware(app, database), "/first")).status == 200
        await close_driver() if earlier == "nothing" else None
        failed = await get(DBSessionMiddleware(app, database), "/fails")
        assert isinstance(failed.error, DBAPIError)
        assert (await get(DBSessionMiddleware(app, database), "/next")).status == 200
        assert real.stored() == ["/first", "/next"]
        await real.assert_clean(database)
