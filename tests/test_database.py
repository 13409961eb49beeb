"""Tests databases: the life of the engine, and units of work outside of a request."""

import asyncio
import gc
import inspect
import sqlite3
import threading
import traceback
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import postgres
import pytest
import sqlmodel
from anyio import to_thread
from asgi import Exchange, get, respond
from conftest import (
    CHILD,
    CLOSES_NEW_CONNECTIONS,
    ENTRY,
    METADATA,
    AnyDatabase,
    Real,
    Running,
    becomes_true,
    real_database,
    set_up_sqlite,
)
from sqlalchemy import URL, Connection, Engine, create_engine, event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, object_session
from sqlalchemy.pool import NullPool, Pool, SingletonThreadPool, StaticPool
from sqlalchemy.schema import CreateTable
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelAsyncSession
from starlette.testclient import TestClient

import asgi_dbsession
from asgi_dbsession import (
    AsyncDatabase,
    ConcurrentUse,
    ConfigurationError,
    DatabaseNotRunning,
    DatabaseUnavailable,
    DBSessionError,
    DBSessionMiddleware,
    NoSession,
    SessionClosed,
    SyncDatabase,
    TransactionAborted,
    get_session,
    get_sync_session,
    set_rollback,
)
from asgi_dbsession.unit.current import current_unit

pytestmark = pytest.mark.anyio


class Base(DeclarativeBase):
    """The base of mapped classes for the tables of the tests."""

    metadata = METADATA


class Entry(Base):
    """A row of the table that the tests write to."""

    __table__ = ENTRY
    id: Mapped[int]
    note: Mapped[str]


class Shouting(AsyncSession):
    """A session class of the application."""

    async def shout(self, note: str) -> None:
        """Store a row, in capitals."""
        await self.execute(ENTRY.insert().values(note=note.upper()))


class ShoutingSync(Session):
    """A sync session class of the application."""

    def shout(self, note: str) -> None:
        """Store a row, in capitals."""
        self.execute(ENTRY.insert().values(note=note.upper()))


@asynccontextmanager
async def beginning(database: AnyDatabase) -> AsyncIterator[Any]:
    """`database.begin()`, whatever its kind."""
    if isinstance(database, SyncDatabase):
        with database.begin() as session:
            yield session
    else:
        async with database.begin() as session:
            yield session


async def result_of(value: Any) -> Any:
    """Return the result of a session method, after awaiting it if needed."""
    return await value if inspect.isawaitable(value) else value


def pool_of(database: AnyDatabase) -> Any:
    """Return the pool of a database; not every pool has all methods of a `QueuePool`."""
    return database.engine.pool


def borrowing(owner: AnyDatabase) -> AnyDatabase:
    """Make another database from the engine of `owner`."""
    database_class: Any = type(owner)
    database: AnyDatabase = database_class.from_engine(owner.engine)
    return database


async def store(database: AnyDatabase, note: str) -> None:
    """Store a row in a new unit of work."""
    async with beginning(database) as session:
        await result_of(session.execute(ENTRY.insert().values(note=note)))


async def notes(database: AnyDatabase) -> list[str]:
    """Return all rows that a new unit of work sees."""
    async with beginning(database) as session:
        return list(await result_of(session.scalars(select(ENTRY.c.note).order_by(ENTRY.c.id))))


# Startup and shutdown


def test_a_script_needs_no_server_and_no_middleware(real: Real) -> None:
    """`async with database:` and `begin()` are sufficient, and nothing is left open at the end."""
    database = real.describe()

    async def script() -> None:
        async with database:
            async with beginning(database) as session:
                await result_of(session.execute(ENTRY.insert().values(note="kept")))
                assert real.stored() == []
            assert real.stored() == ["kept"]

    asyncio.run(script())
    assert not database.is_running
    if real.is_postgresql:
        asyncio.run(becomes_true(lambda: real.connections() == 0))


def test_a_script_without_an_event_loop_writes_with(tmp_path: Path) -> None:
    """Plain `with database:` starts and stops a sync database; it is counted like other starts."""
    database = SyncDatabase(f"sqlite:///{tmp_path / 'shop.db'}")
    with (
        pytest.raises(DatabaseNotRunning, match="with a SyncDatabase also `with database:`"),
        database.begin(),
    ):
        pass
    with database:
        engine = database.engine
        with database, database.begin() as session:
            session.execute(select(1))
        assert database.engine is engine
    assert not database.is_running
    broken = SyncDatabase(f"sqlite:///{tmp_path / 'missing' / 'shop.db'}")
    with pytest.raises(DatabaseUnavailable, match="Does the folder of the file exist"), broken:
        pass
    assert not broken.is_running


async def test_starting_is_counted_not_repeated(real: Real) -> None:
    """Each user starts and stops the database; the last one disposes the engine."""
    database = real.describe()
    async with database:
        engine = database.engine
        async with database:
            assert database.engine is engine
        assert database.engine is engine
        await store(database, "kept")
    assert not database.is_running
    assert real.stored() == ["kept"]


# aiosqlite leaves a connection open if its opening is cancelled, and Python 3.13 warns about it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_two_tasks_may_start_it_at_once(real: Real) -> None:
    """Both callers share one engine; if one is cancelled, the start of the other still counts."""
    database = real.describe()
    for cancelled in (False, True):
        tasks = [asyncio.create_task(database.startup()) for _ in range(2)]
        await asyncio.sleep(0)
        if cancelled:
            tasks[0].cancel()
        await asyncio.wait(tasks)
        await store(database, f"kept {cancelled}")
        for task in tasks:
            assert database.is_running
            if not task.cancelled():
                await database.shutdown()
        assert not database.is_running
    assert real.stored() == ["kept False", "kept True"]


# aiosqlite leaves a connection open if its opening is cancelled, and Python 3.13 warns about it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("turns", [0, 1, 3, 10])
async def test_a_shutdown_during_a_startup_ends_it(real: Real, turns: int) -> None:
    """The cancelled startup raises, nothing stays running, and the next start works."""
    database = real.describe()
    starting = asyncio.create_task(database.startup())
    await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    was_running = starting.done()
    await database.shutdown()
    await asyncio.wait([starting])
    if not was_running:
        assert isinstance(starting.exception(), DatabaseNotRunning | DatabaseUnavailable)
    assert not database.is_running
    async with database:
        await store(database, "kept")
    assert not database.is_running
    assert real.stored() == ["kept"]


@pytest.mark.parametrize("real", ["asyncpg", "psycopg"], indirect=True)
async def test_a_startup_cancelled_at_its_first_statement_raises_the_cancellation(
    real: Real,
) -> None:
    """The statement is SQLAlchemy's own, which asks the server for its version."""
    if not CLOSES_NEW_CONNECTIONS:
        pytest.skip("this SQLAlchemy leaves the connection open")

    def listen(engine: Engine) -> None:
        event.listen(engine, "connect", lambda *_: starting.cancel(), insert=True)

    database = real.describe(on_engine=listen)
    starting = asyncio.create_task(database.startup())
    await asyncio.wait([starting])
    assert starting.cancelled()
    assert not database.is_running
    await becomes_true(lambda: real.connections() == 0)


@pytest.mark.parametrize("moment", ["before_cursor_execute", "rollback"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_shutdown_during_a_ping_leaves_no_connection_open(
    tmp_path: Path, fails: bool, moment: str
) -> None:
    """The engine has a new pool then, so nobody would close the connection in the old one."""
    if fails and moment == "rollback" and not CLOSES_NEW_CONNECTIONS:
        pytest.skip("this SQLAlchemy loses a connection if a listener for ROLLBACK raises")
    used: list[Any] = []

    def shut_down(connection: Connection, *_: object) -> None:
        used.extend([connection.connection.driver_connection, connection.engine.pool])
        database.__exit__()
        if fails:
            raise LookupError

    def listen(engine: Engine) -> None:
        event.listen(engine, moment, shut_down)

    database = SyncDatabase(f"sqlite:///{tmp_path / 'shop.db'}", on_engine=listen)
    with pytest.raises(LookupError if fails else DatabaseNotRunning), database:
        pytest.fail("it started")
    assert not database.is_running
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        used[0].execute("SELECT 1")


def test_starts_in_many_threads_are_all_counted(tmp_path: Path) -> None:
    """Workers that start and stop the database at the same time leave nothing open."""
    database = SyncDatabase(f"sqlite:///{tmp_path / 'shop.db'}")
    failed: list[BaseException] = []

    async def work() -> None:
        async with database:
            with database.begin() as session:
                session.execute(select(1))

    def work_often() -> None:
        try:
            for _ in range(20):
                asyncio.run(work())
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work_often) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (failed, database.is_running) == ([], False)


async def test_a_stop_without_a_start_is_harmless(real: Real) -> None:
    """An additional shutdown is not counted against later starts."""
    database = real.describe()
    await database.shutdown()
    await database.shutdown()
    async with database:
        assert database.is_running
    assert not database.is_running


async def test_before_its_start_and_after_its_stop_there_is_no_engine(real: Real) -> None:
    """Each use raises an error that says that no lifespan arrived, and how to send one."""
    database = real.describe()
    accessors = [lambda: database.engine, lambda: store(database, "lost"), database.ping]
    for _ in range(2):
        for accessor in accessors:
            with pytest.raises(
                DatabaseNotRunning, match=r"lifespan startup .* `async with database:`"
            ):
                await result_of(accessor())
        async with database:
            assert database.engine
    assert real.stored() == []


async def test_a_request_that_no_lifespan_came_before_says_so(real: Real) -> None:
    """A test client that sends no lifespan is the most common mistake of a test suite."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        database.get_session()

    database = real.describe()
    exchange = await get(DBSessionMiddleware(app, database))
    assert isinstance(exchange.error, DatabaseNotRunning)
    assert "LifespanManager" in str(exchange.error)


async def test_begin_that_fails_to_start_leaves_no_unit_of_work_behind(real: Real) -> None:
    """If the database is not running, the outer session is still the current one."""
    stopped = real.describe()
    async with real.describe() as database, beginning(database) as session:
        with pytest.raises(DatabaseNotRunning):
            await store(stopped, "lost")
        assert database.get_session() is session


@pytest.mark.parametrize("pings", [True, False])
def test_another_event_loop_is_told_so(real: Real, *, pings: bool) -> None:
    """Each use of connections of the first loop is refused, and does no damage."""
    if real.is_sync:
        pytest.skip("its connections belong to no loop")
    database = real.describe(ping_on_startup=pings)

    async def in_request() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            database.get_session()

        exchange = await get(DBSessionMiddleware(app, database))
        assert exchange.error is not None
        raise exchange.error

    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(database.startup())
        ways = [lambda: store(database, "lost"), in_request, database.startup, database.ping]
        for way in ways:
            with pytest.raises(DatabaseNotRunning, match=r"another event loop.*asyncio\.run"):
                second.run(way())
        first.run(store(database, "kept"))
        first.run(real.assert_clean(database))
        first.run(database.shutdown())
    assert not database.is_running
    assert real.stored() == ["kept"]


def test_a_database_that_was_stopped_may_be_started_in_another_event_loop(tmp_path: Path) -> None:
    """The first loop still runs in another thread."""
    database = real_database("sqlite", tmp_path).describe()
    assert isinstance(database, AsyncDatabase)
    with asyncio.Runner() as first, asyncio.Runner() as second:
        for runner in (first, second, first):
            runner.run(database.startup())
            runner.run(database.ping())
            runner.run(database.shutdown())


def test_a_refused_engine_belongs_to_no_event_loop() -> None:
    """In another loop the error is the same: the database is not running."""
    database = AsyncDatabase("sqlite+aiosqlite://", no_such_option=1)
    with asyncio.Runner() as first, asyncio.Runner() as second:
        for runner in (first, second):
            with pytest.raises(ConfigurationError, match="no_such_option"):
                runner.run(database.startup())


# Without a shutdown, the driver warns about the open connection.
@pytest.mark.filterwarnings(
    "ignore:.*(while still open|before being closed|unclosed):ResourceWarning"
)
def test_a_loop_that_died_is_followed_by_a_new_one(real: Real) -> None:
    """A test suite that forgets the shutdown gets a new engine without the old connections."""

    async def forget_to_stop() -> None:
        await database.startup()

    async def script() -> None:
        async with database:
            await store(database, "kept")
            await real.assert_clean(database)

    # Open no connection: a thread of aiosqlite would live longer than its event loop.
    database = real.describe(ping_on_startup=real.is_postgresql)
    asyncio.run(forget_to_stop())
    asyncio.run(script())
    if real.is_sync:  # the engine belongs to no loop, and was started twice
        asyncio.run(database.shutdown())
    assert not database.is_running
    assert real.stored() == ["kept"]


# Engines of the application


async def test_an_engine_of_ones_own_is_running_at_once_and_never_disposed(real: Real) -> None:
    """The application keeps its engine after each shutdown, and the connections stay open."""
    async with real.describe() as owner:
        database = borrowing(owner)
        assert database.is_running
        assert database.engine is owner.engine
        await store(database, "at once")
        async with database:
            await store(database, "started")
        await database.shutdown()
        assert database.is_running
        assert pool_of(owner).checkedin() == 1
        await store(database, "stopped")
        await real.assert_clean(database)
    assert real.stored() == ["at once", "started", "stopped"]


async def test_an_engine_of_ones_own_is_watched_for_silent_rollbacks(real: Real) -> None:
    """After a caught error, PostgreSQL's COMMIT stores nothing, and the package raises an error."""
    if not real.is_postgresql:
        pytest.skip("only PostgreSQL aborts a transaction at an error")
    engine: Any = create_engine(real.url) if real.is_sync else create_async_engine(real.url)
    database_class: Any = SyncDatabase if real.is_sync else AsyncDatabase
    database = database_class.from_engine(engine)
    await store(database, "once")

    async def swallow() -> None:
        async with beginning(database):
            with pytest.raises(IntegrityError):
                await Running(real, database).write("once")

    with pytest.raises(TransactionAborted, match="begin_nested"):
        await swallow()
    await real.assert_clean(database)
    await result_of(engine.dispose())
    assert real.stored() == ["once"]


@pytest.mark.parametrize(
    "real", ["psycopg", "psycopg-sync", "asyncmy", "pymysql-sync"], indirect=True
)
async def test_an_engine_of_ones_own_may_not_switch_the_driver_to_autocommit(real: Real) -> None:
    """A rollback would take nothing back, and the options of the engine are not shown before."""
    make: Any = create_engine if real.is_sync else create_async_engine
    engine: Any = make(real.url, connect_args={"autocommit": True})
    database_class: Any = SyncDatabase if real.is_sync else AsyncDatabase
    database = database_class.from_engine(engine)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Running(real, database).write("one")
        await respond(send, 409)

    exchange = await get(DBSessionMiddleware(app, database))
    assert (exchange.status, real.stored()) == (None, [])
    assert isinstance(exchange.error, ConfigurationError)
    with pytest.raises(ConfigurationError, match='isolation_level="AUTOCOMMIT"'):
        await database.startup()
    await result_of(engine.dispose())


def listeners_on(engine: Any) -> dict[str, int]:
    """Return how many listeners an engine has for each event, and its replaced methods."""
    engine = getattr(engine, "sync_engine", engine)
    return {name: 1 for name in vars(engine.dialect) if name.startswith("do_")} | {
        f"{name} of {type(target).__name__}": len(list(getattr(target.dispatch, name)))
        for target in (engine, engine.pool, engine.dialect)
        for name in dir(target.dispatch)
        if not name.startswith("_") and hasattr(getattr(target.dispatch, name), "__iter__")
    }


@pytest.mark.parametrize("is_copy", [False, True])
def test_an_engine_of_ones_own_keeps_nothing_of_a_database_that_is_gone(
    real: Real, *, is_copy: bool
) -> None:
    """No listener and no reference stays; while another database uses the engine, all stay."""
    kind: Any = SyncDatabase if real.is_sync else AsyncDatabase
    url = real.describe().url
    engine: Any = create_engine(url) if real.is_sync else create_async_engine(url)
    before = listeners_on(engine)
    given = engine.execution_options(logging_token="a copy") if is_copy else engine
    first, second = kind.from_engine(given), kind.from_engine(given)
    app: Any = respond
    DBSessionMiddleware(app, first, on_report=print, attempts=2)
    watched = listeners_on(engine)
    assert watched != before
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    assert listeners_on(engine) == watched
    del second
    gc.collect()
    assert listeners_on(engine) == before


async def test_what_an_owner_adds_to_its_engine_stays(real: Real) -> None:
    """Listeners stay on an owned engine when a database that borrowed it is gone."""
    async with real.describe() as owner:
        watched = listeners_on(owner.engine)
        database = borrowing(owner)
        del database
        gc.collect()
        assert listeners_on(owner.engine) == watched


# Without a dispose(), a closed loop leaves a warning of the driver.
@pytest.mark.filterwarnings(
    "ignore:.*(while still open|before being closed|unclosed):ResourceWarning"
)
@pytest.mark.parametrize("real", ["asyncpg", "psycopg", "asyncmy", "sqlite"], indirect=True)
def test_an_engine_of_ones_own_serves_one_client_after_the_other(real: Real) -> None:
    """Tests often use a new event loop for each test, and close it afterwards."""
    serve_three_clients(real)
    gc.collect()  # collected here, because the closed loops may cause warnings
    assert real.stored() == ["/one", "/two", "/three"]


def serve_three_clients(real: Real) -> None:
    """Two event loops use one engine, one after the other."""
    engine = create_async_engine(real.describe().url)
    database = AsyncDatabase.from_engine(engine)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await database.get_session().execute(ENTRY.insert().values(note=scope["path"]))
            await respond(send)

    for path in ("/one", "/two", "/three"):
        with TestClient(DBSessionMiddleware(app, database)) as client:
            assert client.get(path).status_code == 200


@pytest.mark.parametrize("real", ["asyncpg", "psycopg"], indirect=True)
def test_an_engine_of_ones_own_in_two_loops_at_once_is_told_what_to_do(real: Real) -> None:
    """Without a pool it works. With a pool it is refused: connections belong to one loop."""
    for options in ({}, {"poolclass": NullPool}):
        engine = create_async_engine(real.url, **options)
        database = AsyncDatabase.from_engine(engine)
        with asyncio.Runner() as first, asyncio.Runner() as second:
            first.run(store(database, f"first {options}"))
            if options:
                second.run(store(database, "second"))
            else:
                for way in (database.startup, partial(store, database, "lost")):
                    with pytest.raises(DatabaseNotRunning, match="needs `poolclass=NullPool`"):
                        second.run(way())
            first.run(engine.dispose())
    assert len(real.stored()) == 3


def test_an_engine_of_the_other_kind_is_refused() -> None:
    """The error is raised at once, and names the kind that is needed."""
    wrong: Any = create_engine("sqlite://")
    with pytest.raises(
        ConfigurationError, match=r"AsyncDatabase\.from_engine takes an AsyncEngine, not"
    ):
        AsyncDatabase.from_engine(wrong)
    wrong = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(ConfigurationError, match=r"SyncDatabase\.from_engine takes an Engine, not"):
        SyncDatabase.from_engine(wrong)
    wrong = "sqlite://"
    with pytest.raises(ConfigurationError, match=r"SyncDatabase\.from_engine takes an Engine, not"):
        SyncDatabase.from_engine(wrong)


@pytest.mark.parametrize("database_class", [AsyncDatabase, SyncDatabase])
async def test_the_environment_names_the_database(
    database_class: type[AnyDatabase], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URL is in `DATABASE_URL` or in another variable; options are arguments."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'shop.db'}")
    monkeypatch.setenv("REPORTS_URL", f"sqlite:///{tmp_path / 'reports.db'}")
    shop = database_class.from_env()
    reports = database_class.from_env("REPORTS_URL", pool_size=7, ping_on_startup=False)
    assert type(shop) is database_class
    assert shop.url.database == str(tmp_path / "shop.db")
    async with reports:
        assert str(reports.engine.url.database) == str(tmp_path / "reports.db")
        assert pool_of(reports).size() == 7


@pytest.mark.parametrize("database_class", [AsyncDatabase, SyncDatabase])
@pytest.mark.parametrize("value", [None, ""])
def test_an_environment_without_the_variable_is_told_what_to_set(
    database_class: type[AnyDatabase], value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that is not set and an empty variable give the same error."""
    if value is None:
        monkeypatch.delenv("SHOP_URL", raising=False)
    else:
        monkeypatch.setenv("SHOP_URL", value)
    with pytest.raises(ConfigurationError, match=r"SHOP_URL=sqlite:///shop\.db"):
        database_class.from_env("SHOP_URL")


# Ping


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "psycopg-sync"])
async def test_ping_says_that_the_database_is_gone_and_that_it_is_back(driver: str) -> None:
    """A health check may ping at any time, and leaks no connection."""
    url = postgres.new_database("gone").set(drivername=f"postgresql+{driver.removesuffix('-sync')}")
    database = SyncDatabase(url) if driver.endswith("-sync") else AsyncDatabase(url)
    administrator = create_engine(
        postgres.administrator_url(), isolation_level="AUTOCOMMIT", poolclass=NullPool
    )
    async with database:
        await database.ping()
        with administrator.connect() as connection:
            connection.execute(text("DROP DATABASE gone WITH (FORCE)"))
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable, match="Is it running, and are host") as caught:
                await database.ping()
            assert caught.value.__cause__ is not None
            assert "\n" not in str(caught.value)
            assert pool_of(database).checkedout() == 0
        postgres.new_database("gone")
        await database.ping()
        assert pool_of(database).checkedout() == 0


@pytest.mark.parametrize("real", ["asyncpg", "psycopg", "psycopg-sync"], indirect=True)
async def test_a_ping_leaves_no_connection_if_the_engine_is_disposed_meanwhile(
    running: Running,
) -> None:
    """The new pool does not know the connection, and would never close it."""
    engine: Any = running.database.engine
    sync_engine = getattr(engine, "sync_engine", engine)
    event.listen(sync_engine, "after_cursor_execute", lambda *_: sync_engine.dispose(), once=True)
    await running.database.ping()
    with anyio.fail_after(10):
        while await to_thread.run_sync(running.real.connections):
            await anyio.sleep(0.01)
    await running.database.ping()
    assert running.real.connections() == 1


@pytest.mark.parametrize("real", ["asyncmy", "aiomysql", "pymysql-sync"], indirect=True)
async def test_a_login_that_is_refused_names_what_may_be_missing(real: Real) -> None:
    """The password may be set later, by a listener, so the ping can be switched off."""
    wrong = real.url.set(username="nobody", password="wrong-password")
    database_class: Any = type(real.describe())
    with pytest.raises(DatabaseUnavailable, match=r"`ping_on_startup=False`.*`do_connect`"):
        await database_class(wrong).startup()


@pytest.mark.parametrize("kind", [AsyncDatabase, SyncDatabase])
async def test_what_a_listener_raises_is_not_taken_for_a_database_that_is_gone(
    kind: Any, tmp_path: Path
) -> None:
    """An error of the application's own listener is raised unchanged."""
    if kind is AsyncDatabase and not CLOSES_NEW_CONNECTIONS:
        pytest.skip("this SQLAlchemy leaves the connection open")

    def fail(*_: Any) -> None:
        error = LookupError("no coffee")
        raise error from error  # as a listener does that catches and raises again

    database = kind(f"sqlite:///{tmp_path / 'shop.db'}", pool_events=[(fail, "connect")])
    with pytest.raises(LookupError, match="no coffee"):
        await database.startup()
    assert not database.is_running


@pytest.mark.parametrize("kind", [AsyncDatabase, SyncDatabase])
async def test_a_pool_that_is_used_up_is_told_as_that(kind: Any, tmp_path: Path) -> None:
    """Host, port and credentials are right, so the error does not mention them."""
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    async with kind(f"sqlite:///{tmp_path / 'shop.db'}", **options) as database:
        held: Any = database.engine.connect()
        connection = held if kind is SyncDatabase else await held
        with pytest.raises(DatabaseUnavailable, match="All connections of its pool are in use"):
            await database.ping()
        await result_of(connection.close())


@pytest.mark.parametrize("database_class", [AsyncDatabase, SyncDatabase])
async def test_a_start_that_fails_is_no_start(
    database_class: type[AnyDatabase], tmp_path: Any
) -> None:
    """Nothing stays open, and the next start may succeed."""
    folder = tmp_path / "missing"
    database = database_class(f"sqlite:///{folder / 'shop.db'}")
    with pytest.raises(DatabaseUnavailable, match="Does the folder of the file exist"):
        await database.startup()
    assert not database.is_running
    folder.mkdir()
    async with database:
        assert database.is_running
    assert not database.is_running


# Units of work


async def test_begin_commits_on_success(running: Running) -> None:
    """Other connections see the row only after the block."""
    async with beginning(running.database):
        await running.write("kept")
        assert running.stored() == []
    assert running.stored() == ["kept"]


@pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError, GeneratorExit])
async def test_begin_rolls_back_on_any_error(running: Running, error: type[BaseException]) -> None:
    """Other exceptions than `Exception` roll back too; the error is raised unchanged."""
    raised = error()

    async def fail() -> None:
        async with beginning(running.database):
            await running.write("lost")
            raise raised

    with pytest.raises(error) as caught:
        await fail()
    assert caught.value is raised
    assert running.stored() == []


@pytest.mark.parametrize(("rollback", "kept"), [(True, []), (False, ["it"])])
async def test_set_rollback_decides_for_begin_too(
    running: Running, rollback: bool, kept: list[str]
) -> None:
    """A dry run needs one line."""
    async with beginning(running.database):
        await running.write("it")
        set_rollback(True)
        set_rollback(rollback)
    assert running.stored() == kept


async def test_set_rollback_does_not_save_what_an_error_broke(running: Running) -> None:
    """An exception rolls back in any case."""

    async def fail() -> None:
        async with beginning(running.database):
            await running.write("lost")
            set_rollback(False)
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert running.stored() == []


async def test_a_failed_commit_of_begin_is_raised_as_it_is(running: Running) -> None:
    """SQLAlchemy's error is raised, nothing is stored, and the connection is clean afterwards."""

    async def fail() -> None:
        async with beginning(running.database):
            await running.write("lost")
            await running.doom()

    with pytest.raises(IntegrityError):
        await fail()
    await running.assert_clean()
    assert running.stored() == []
    await store(running.database, "kept")
    assert running.stored() == ["kept"]


async def test_the_accessor_of_the_other_kind_names_the_kind_that_is_missing(
    running: Running,
) -> None:
    """The error says which accessor to use."""
    other, missing, cure = (
        (get_session, "AsyncDatabase", "get_sync_session")
        if running.real.is_sync
        else (get_sync_session, "SyncDatabase", "get_session")
    )
    async with beginning(running.database):
        with pytest.raises(
            ConfigurationError, match=rf"There is no {missing} here.* Use `{cure}\(\)`"
        ):
            other()


async def test_the_session_of_begin_is_the_current_one(running: Running) -> None:
    """Code that calls `get_session()` works the same in a request and in a script."""
    mine, database = get_sync_session if running.real.is_sync else get_session, running.database
    async with beginning(database) as outer:
        assert database.get_session() is outer
        assert mine() is outer
        async with beginning(database) as inner:
            assert inner is not outer
            assert mine() is database.get_session() is inner
        assert mine() is database.get_session() is outer
    with pytest.raises(NoSession, match=r"database\.begin\(\)"):
        mine()


async def test_a_session_of_begin_ends_with_its_block(running: Running) -> None:
    """The session can never check out a connection afterwards."""
    async with beginning(running.database) as session:
        await running.write("kept")
    with pytest.raises(SessionClosed, match=r"database\.begin\(\)"):
        await result_of(session.execute(select(ENTRY)))
    await running.assert_clean()


async def test_begin_holds_no_connection_until_the_first_statement(running: Running) -> None:
    """A worker may open the block before it waits for work."""
    held = []
    async with beginning(running.database):
        held.append(pool_of(running.database).checkedout())
        await running.write("kept")
        held.append(pool_of(running.database).checkedout())
    held.append(pool_of(running.database).checkedout())
    assert held == [0, 1, 0]


async def test_an_audit_row_survives_the_rollback_of_its_request(running: Running) -> None:
    """`begin()` in a request is a new transaction, and knows the scope of the request."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = running.database.get_session()
        if running.real.is_postgresql:  # SQLite has one writer at a time
            await running.write("lost before")
        async with beginning(running.database) as audit:
            await running.write("audit")
            seen.append((audit is session, audit.info["scope"] is scope))
        seen.append(running.database.get_session() is session)
        await running.write("lost after")
        await respond(send, 400)

    assert (await get(DBSessionMiddleware(app, running.database))).status == 400
    assert seen == [(False, True), True]
    assert running.stored() == ["audit"]


async def test_a_task_that_outlives_its_request_acts_for_nobody(running: Running) -> None:
    """A `begin()` in a task that outlives its request has no scope."""
    ended = asyncio.Event()
    tasks: list[asyncio.Task[Any]] = []

    async def work() -> Any:
        await ended.wait()
        async with beginning(running.database) as session:
            return session.info["scope"]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        running.database.get_session()
        tasks.append(asyncio.create_task(work()))
        async with beginning(running.database), beginning(running.database):
            tasks.append(asyncio.create_task(work()))
        await respond(send)

    await get(DBSessionMiddleware(app, running.database))
    ended.set()
    assert await asyncio.gather(*tasks) == [None, None]


async def test_set_rollback_in_begin_does_not_decide_for_its_request(running: Running) -> None:
    """`set_rollback` of one unit does not affect the other unit."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with beginning(running.database):
            await running.write("lost")
            set_rollback(True)
        await running.write("kept")
        await respond(send)

    await get(DBSessionMiddleware(app, running.database))
    assert running.stored() == ["kept"]


async def test_tasks_at_once_have_a_unit_of_work_each(running: Running) -> None:
    """`begin()` in each child is safe; `gather` over one session is not."""

    async def child(number: int) -> None:
        async with beginning(running.database):
            await running.execute(select(ENTRY))
            if running.real.is_postgresql or number == 0:  # SQLite has one writer at a time
                await running.write(f"child {number}")
            if number == 1:
                raise LookupError

    results = await asyncio.gather(*map(child, range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), LookupError, type(None)]
    expected = ["child 0", "child 2"] if running.real.is_postgresql else ["child 0"]
    assert sorted(running.stored()) == expected


async def test_begin_outside_of_a_request_knows_of_none(running: Running) -> None:
    """Listeners that read `session.info["scope"]` find None, and no missing key."""
    async with beginning(running.database) as session:
        assert session.info["scope"] is None


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("takes_turns", [False, True])
async def test_jobs_that_start_each_other_keep_nothing_of_each_other(
    running: Running, overlap: bool, takes_turns: bool
) -> None:
    """Each job starts inside the `begin()` of the job before, which may have ended."""
    units: list[weakref.ref[Any]] = []
    other: Any = running.real.describe() if takes_turns else running.database

    async def job(number: int, before: asyncio.Event) -> None:
        begun = asyncio.Event()
        async with beginning((running.database, other)[number % 2]):
            before.set()
            units.append(weakref.ref(current_unit.get()))
            if number < 20:
                start(job(number + 1, begun))
                if overlap:
                    await begun.wait()
            else:
                await becomes_true(lambda: len(tasks) == 1)
                gc.collect()
                alive.append(sum(unit() is not None for unit in units))

    def start(coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    alive: list[int] = []
    tasks: set[asyncio.Task[None]] = set()
    async with other if takes_turns else nullcontext():
        start(job(0, asyncio.Event()))
        await becomes_true(lambda: not tasks)
    assert len(units) == 21
    assert alive[0] <= 4


@pytest.mark.parametrize("in_request", [True, False])
async def test_units_that_end_out_of_order_leave_the_right_one(
    running: Running, in_request: bool
) -> None:
    """The open unit stays the current one; after both, the earlier unit is current again."""
    seen: list[bool] = []
    database = running.database

    async def app(scope: Any, receive: Any, send: Any) -> None:
        outer = database.get_session() if in_request else None
        first, second = beginning(database), beginning(database)
        await first.__aenter__()
        session = await second.__aenter__()
        await first.__aexit__(None, None, None)
        seen.append(database.get_session() is session)
        await running.write("kept")
        await second.__aexit__(None, None, None)
        if in_request:
            seen.append(database.get_session() is outer)
        else:
            with pytest.raises(SessionClosed):
                database.get_session()
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, database) if in_request else app)
    assert exchange.error is None
    assert seen == [True] * (2 if in_request else 1)
    assert running.stored() == ["kept"]


async def test_a_task_that_outlives_its_unit_is_told_so_after_one_of_its_own(
    running: Running,
) -> None:
    """The block does not use the transaction of the outer request."""
    database = running.database

    async def outlive(over: asyncio.Event) -> None:
        await over.wait()
        async with beginning(database):
            await running.write("kept")
        with pytest.raises(SessionClosed):
            database.get_session()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        over = asyncio.Event()
        async with beginning(database):
            task = asyncio.create_task(outlive(over))
        over.set()
        await task
        await respond(send)

    assert (await get(DBSessionMiddleware(app, database))).error is None
    assert running.stored() == ["kept"]


async def test_the_session_dependency_is_the_session(running: Running) -> None:
    """It works inside a unit of work, and has no parameters that a framework would read."""
    dependency = running.database.session_dependency
    async with beginning(running.database) as session:
        assert await dependency() is session
        if not running.real.is_sync:
            assert await asgi_dbsession.session_dependency() is session
    for function in (dependency, asgi_dbsession.session_dependency):
        assert inspect.iscoroutinefunction(function)
        assert not inspect.signature(function).parameters


# Sessions


async def test_objects_can_be_read_after_the_commit(running: Running) -> None:
    """`expire_on_commit` is False, so a template can read attributes without a session."""
    entry = Entry(note="kept")
    async with beginning(running.database) as session:
        session.add(entry)
    assert entry.note == "kept"
    assert entry.id is not None
    assert running.stored() == ["kept"]


async def test_session_options_reach_the_session(real: Real) -> None:
    """Options of the application are kept, `info` included, beside the scope."""
    options: Any = {"expire_on_commit": True, "autoflush": False, "info": {"tenant": "blue"}}
    async with real.describe(session_options=options) as database:
        async with beginning(database) as session:
            entry = Entry(note="kept")
            session.add(entry)
            assert session.autoflush is False
            assert session.info == {"tenant": "blue", "scope": None}
        assert inspect.getattr_static(entry, "note") is not None
        assert "note" not in entry.__dict__
    assert real.stored() == ["kept"]


@pytest.mark.parametrize("origin", ["sqlmodel", "own"])
async def test_a_session_class_of_ones_own_stays_itself(real: Real, origin: str) -> None:
    """The session is an instance of the given class, with its methods, in the same transaction."""
    session_class: Any
    if origin == "own":
        session_class = ShoutingSync if real.is_sync else Shouting
    else:
        session_class = sqlmodel.Session if real.is_sync else SQLModelAsyncSession
    options: Any = {"class_": session_class}
    async with real.describe(session_options=options) as database:
        async with beginning(database) as session:
            assert isinstance(session, session_class)
            assert database.get_session() is session
            if origin == "own":
                await result_of(session.shout("kept"))
            else:
                session.add(Entry(note="KEPT"))
                query: Any = sqlmodel.select(Entry.note)
                assert (await result_of(session.exec(query))).all() == ["KEPT"]
            assert real.stored() == []
        assert real.stored() == ["KEPT"]
        with pytest.raises(SessionClosed, match=r"database\.begin\(\)"):
            await result_of(
                session.shout("lost") if origin == "own" else session.exec(sqlmodel.select(1))
            )
        await real.assert_clean(database)


async def test_the_session_behind_an_async_one_can_be_of_ones_own(real: Real) -> None:
    """`sync_session_class` is used for lazy loading and `run_sync`, as in SQLAlchemy."""
    if real.is_sync:
        pytest.skip("there is none behind it")
    options: Any = {"sync_session_class": ShoutingSync}
    async with real.describe(session_options=options) as database:
        async with beginning(database) as session:
            assert isinstance(session.sync_session, ShoutingSync)
            await session.run_sync(lambda sync: sync.shout("kept"))
        assert real.stored() == ["KEPT"]


async def test_a_session_class_of_ones_own_may_prepare_itself_and_is_closed(real: Real) -> None:
    """The `info` of its constructor stays, and its `close` is always called."""
    closed: list[object] = []

    class Careful(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.info["tenant"] = "blue"

        def close(self) -> None:
            closed.append(self.info["tenant"])
            super().close()

    options: Any = {"class_" if real.is_sync else "sync_session_class": Careful}
    async with real.describe(session_options=options) as database:
        async with beginning(database) as session:
            assert session.info == {"tenant": "blue", "scope": None}
        async with beginning(database) as session:
            session.add(Entry(note="kept"))
    assert closed == ["blue", "blue"]
    assert real.stored() == ["kept"]


async def test_a_with_block_of_a_session_calls_the_close_of_its_class(real: Real) -> None:
    """As SQLAlchemy does. The session is closed once more when its unit of work ends."""
    if not real.is_sync:
        pytest.skip("an AsyncSession is closed by its own class")
    closed: list[object] = []

    class Careful(Session):
        def close(self) -> None:
            closed.append(self.in_transaction())
            super().close()

    options: Any = {"class_": Careful}
    async with real.describe(session_options=options) as database, beginning(database) as session:
        with session:
            session.add(Entry(note="kept"))
            session.commit()
        assert closed == [False]
    assert closed == [False, False]
    assert real.stored() == ["kept"]


async def test_objects_belong_to_no_session_once_it_is_over(real: Real) -> None:
    """The connection is returned, so that others can use it."""
    async with real.describe() as database:
        async with beginning(database) as session:
            entry = Entry(note="kept")
            session.add(entry)
            await result_of(session.commit())
        assert object_session(entry) is None
        async with beginning(database) as session:
            session.add(entry)
            entry.note = "changed"
    assert real.stored() == ["changed"]


@pytest.mark.parametrize("is_inherited", [False, True])
async def test_a_flush_of_ones_own_is_called_before_each_statement(
    real: Real, *, is_inherited: bool
) -> None:
    """It may add objects to the session if there is nothing else to flush."""

    class Queueing(Session):
        def flush(self, objects: Any = None) -> None:
            if not self.new:
                self.add_all(Entry(note=note) for note in self.info.pop("queue", ()))
            super().flush(objects)

    class Derived(Queueing):
        pass

    class_ = Derived if is_inherited else Queueing
    options = {"class_" if real.is_sync else "sync_session_class": class_}
    database: Any = real.describe(session_options=options)
    async with database:
        async with beginning(database) as session:
            session.info["queue"] = ["one", "two"]
            found = await Running(real, database).execute(select(Entry.note))
            assert found.scalars().all() == ["one", "two"]
        await real.assert_clean(database)
    assert real.stored() == ["one", "two"]


@pytest.mark.parametrize("wrong", [Session, dict, None, "AsyncSession", AsyncSession(), Entry])
def test_what_is_no_async_session_class_is_refused(wrong: Any) -> None:
    """The error is raised when the database is configured, not at the first request."""
    with pytest.raises(ConfigurationError, match="subclass of AsyncSession"):
        AsyncDatabase("sqlite://", session_options={"class_": wrong})


@pytest.mark.parametrize("wrong", [AsyncSession, SQLModelAsyncSession, dict, None])
def test_what_is_no_session_class_is_refused(wrong: Any) -> None:
    """The class of sync sessions is checked too."""
    with pytest.raises(ConfigurationError, match="subclass of Session"):
        SyncDatabase("sqlite://", session_options={"class_": wrong})


# SQLite in memory

MEMORY = [
    pytest.param(AsyncDatabase, "sqlite+aiosqlite://", id="async"),
    pytest.param(AsyncDatabase, "sqlite+aiosqlite:///:memory:", id="async-named"),
    pytest.param(
        AsyncDatabase,
        "sqlite+aiosqlite:///file:a?mode=memory&cache=shared&uri=true",
        id="async-uri",
    ),
    pytest.param(AsyncDatabase, "sqlite+aiosqlite:///file::memory:?uri=true", id="async-file"),
    pytest.param(SyncDatabase, "sqlite://", id="sync"),
    pytest.param(SyncDatabase, "sqlite:///:memory:", id="sync-named"),
    pytest.param(SyncDatabase, "sqlite:///file:b?mode=memory&cache=shared&uri=true", id="sync-uri"),
    pytest.param(SyncDatabase, "sqlite:///file::memory:?uri=true", id="sync-file"),
]


@asynccontextmanager
async def with_tables(database: AnyDatabase) -> AsyncIterator[Running]:
    """A database in memory, running, with the tables of the tests."""
    async with database:
        async with beginning(database) as session:
            if isinstance(database, SyncDatabase):
                METADATA.create_all(session.connection())
            else:
                await session.run_sync(lambda sync: METADATA.create_all(sync.connection()))
        real: Any = None  # no other connection can see this database
        yield Running(real, database)
        assert pool_of(database).checkedout() == 0


@pytest.mark.parametrize(("database_class", "url"), MEMORY)
async def test_a_database_in_memory_outlives_its_sessions(
    database_class: type[AnyDatabase], url: str
) -> None:
    """Each request finds rows of other requests, also of requests in other threads."""
    async with with_tables(database_class(url)) as running:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await running.write(scope["path"])
            await respond(send)

        middleware = DBSessionMiddleware(app, running.database)
        statuses = [(await get(middleware, path)).status for path in ("/1", "/2", "/3")]
        assert statuses == [200, 200, 200]
        assert await notes(running.database) == ["/1", "/2", "/3"]


@pytest.mark.parametrize(("database_class", "url"), MEMORY[::4])
async def test_a_database_in_memory_outlives_a_failed_commit(
    database_class: type[AnyDatabase], url: str
) -> None:
    """ROLLBACK is enough then: a new connection would find an empty database."""
    options: Any = {"pool_events": [(set_up_sqlite, "connect")]}
    async with with_tables(database_class(url, **options)) as running:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await running.write(scope["path"])
            if scope["path"] == "/doomed":
                await running.execute(CHILD.insert().values(entry_id=-1))
            await respond(send)

        middleware = DBSessionMiddleware(app, running.database)
        assert (await get(middleware, "/kept")).status == 200
        assert isinstance((await get(middleware, "/doomed")).error, IntegrityError)
        assert await notes(running.database) == ["/kept"]


@pytest.mark.parametrize(("database_class", "url"), MEMORY)
async def test_requests_at_once_do_not_share_a_transaction_in_memory(
    database_class: type[AnyDatabase], url: str
) -> None:
    """A rollback of one request does not affect the work of another request."""
    written = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write(scope["path"])
        if scope["path"] == "/lost":
            written.set()
            # With a shared connection, it would end our transaction too.
            await asyncio.wait([other], timeout=0.2)
            await respond(send, 400)
        else:
            await respond(send)

    async def ask_for_the_other() -> Exchange:
        await written.wait()
        return await get(middleware, "/kept")

    async with with_tables(database_class(url)) as running:
        middleware = DBSessionMiddleware(app, running.database)
        other = asyncio.create_task(ask_for_the_other())
        assert (await get(middleware, "/lost")).status == 400
        assert (await other).status == 200
        assert await notes(running.database) == ["/kept"]


@pytest.mark.parametrize("database_class", [AsyncDatabase, SyncDatabase])
@pytest.mark.parametrize(
    "options",
    [
        {"connect_args": {"timeout": 5}},
        {"poolclass": StaticPool},
        {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}},
    ],
    ids=str,
)
async def test_engine_options_for_a_database_in_memory_are_respected(
    database_class: type[AnyDatabase], options: dict[str, Any]
) -> None:
    """The URL of most tutorials still works, in the thread of any handler."""
    async with database_class("sqlite://", **options) as database:
        if "poolclass" in options:
            assert isinstance(database.engine.pool, options["poolclass"])

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await Running(None, database).execute(select(1))  # type: ignore[arg-type]
            await respond(send)

        exchange = await get(DBSessionMiddleware(app, database))
        assert exchange.error is None
        assert exchange.status == 200
        async with beginning(database) as session:  # now in the thread of the event loop
            await result_of(session.execute(select(1)))


@pytest.mark.parametrize("pool", [StaticPool, SingletonThreadPool, None], ids=str)
@pytest.mark.parametrize("how", ["from_engine", "options"])
@pytest.mark.parametrize("database_class", [AsyncDatabase, SyncDatabase])
async def test_an_engine_with_one_connection_for_all_sessions_is_named_in_the_log(
    database_class: type[AnyDatabase],
    how: str,
    pool: type[Pool] | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A COMMIT of one request would store the work of another that fails: say it, once."""
    is_async = database_class is AsyncDatabase
    if is_async and pool is SingletonThreadPool:
        pytest.skip("SQLAlchemy refuses this pool")
    url = f"sqlite+{'aiosqlite' if is_async else 'pysqlite'}:///{tmp_path / 'shared.db'}"
    options: dict[str, Any] = {"poolclass": pool} if pool is not None else {}
    if how == "from_engine":
        make: Any = create_async_engine if is_async else create_engine
        engine = make(url, **options)
        for _ in range(2):
            async with database_class.from_engine(engine, ping_on_startup=False):
                pass
        await result_of(engine.dispose())
    else:
        async with database_class(url, ping_on_startup=False, **options):
            pass
    lines = [each.getMessage() for each in caplog.records if each.name == "asgi_dbsession"]
    if pool is None:
        assert lines == []
    else:
        (line,) = lines
        assert pool.__name__ in line
        assert "without `poolclass`" in line
        assert "if they send one request at a time, and open no `begin()`" in line


@pytest.mark.parametrize("database_class", [AsyncDatabase, SyncDatabase])
async def test_a_block_in_a_request_shares_its_transaction_where_all_share_one_connection(
    database_class: type[AnyDatabase],
) -> None:
    """So the log warns of a StaticPool even in tests that send one request at a time."""
    async with database_class("sqlite://", poolclass=StaticPool) as database:
        async with beginning(database) as session:
            await result_of(session.execute(CreateTable(ENTRY)))

        async def app(scope: Any, receive: Any, send: Any) -> None:
            insert = ENTRY.insert().values(note="of a request that fails")
            await result_of(database.get_session().execute(insert))
            async with beginning(database) as session:
                await result_of(session.execute(ENTRY.insert().values(note="of the block")))
            await respond(send, 400)

        exchange = await get(DBSessionMiddleware(app, database))
        assert (exchange.status, exchange.error) == (400, None)
        assert len(await notes(database)) == 2


# Error texts


def raised_by(use: Callable[[], Any]) -> DBSessionError:
    """Return the error that `use` raises without an event loop."""
    with ThreadPoolExecutor(1) as pool, pytest.raises(DBSessionError) as caught:
        pool.submit(use).result()
    return caught.value


@pytest.mark.parametrize("place", ["password", "options"])
async def test_no_text_ever_shows_a_password(place: str) -> None:
    """The password is in no repr of the database, in no error, and in no cause of an error."""
    word = "hush/hush"
    url = postgres.new_database("secret").set(drivername="postgresql+psycopg")
    url = (
        url.set(password=word) if place == "password" else url.update_query_dict({"password": word})
    )
    database, sync_database = AsyncDatabase(url), SyncDatabase(url)
    app: Any = respond
    several: Any = [url.render_as_string(hide_password=False)]
    text_of_url: Any = url.render_as_string(hide_password=False)
    errors: list[BaseException] = []
    for each in (database, sync_database):
        wrong: Any = {"class_": dict}
        engine: Any = create_engine(url) if each is database else create_async_engine(url)
        mistakes: Any = (
            lambda each=each: each.engine,
            each.get_session,
            lambda each=each, wrong=wrong: type(each)(url, session_options=wrong),
            lambda each=each: DBSessionMiddleware(app, each, each),
            lambda each=each, engine=engine: type(each).from_engine(engine),
            lambda each=each: type(each).from_engine(text_of_url),
            lambda engine=engine: DBSessionMiddleware(app, engine),
            lambda: DBSessionMiddleware(app, several),
        )
        errors += map(raised_by, mistakes)
        for broken in (type(each)(url, nonsense=word), type(each)(url.set(database="nobody"))):
            with pytest.raises(DBSessionError) as caught:
                await broken.startup()
            errors.append(caught.value)
    for driver in ("postgresql+psycopg2", "postgresql+nonsense", "mssql+aioodbc", "nonsense"):
        changed = url.set(drivername=driver)
        errors.append(raised_by(lambda changed=changed: AsyncDatabase(changed)))  # type: ignore[misc]
    errors.append(raised_by(lambda: SyncDatabase(url.set(drivername="postgresql+asyncpg"))))
    async with database:

        async def swallow() -> None:
            async with database.begin() as session:
                with pytest.raises(DBAPIError):
                    await session.execute(text("SELECT 1 / 0"))

        with pytest.raises(TransactionAborted) as aborted:
            await swallow()
        async with database.begin() as session:
            at_once = [session.execute(select(1)) for _ in range(2)]
            results = await asyncio.gather(*at_once, return_exceptions=True)
        with pytest.raises(SessionClosed) as closed:
            await session.execute(select(1))
        concurrent = [each for each in results if isinstance(each, ConcurrentUse)]
        assert concurrent
        errors += [aborted.value, closed.value, *concurrent]
    shown = [str(database), repr(database), str(sync_database), repr(sync_database)]
    assert all("secret" in each for each in shown)
    shown += ["".join(traceback.format_exception(error)) for error in errors]
    assert [each for each in shown if "hush" in each] == []


async def test_the_password_is_hidden_where_the_driver_quotes_it() -> None:
    """The error shows the class of the driver's error, and nothing of its text."""
    wrong = {"target_session_attrs": "hush"}
    url = URL.create("postgresql+psycopg", "app", "hush", "localhost", query=wrong)
    with pytest.raises(DatabaseUnavailable, match="reached: OperationalError") as caught:
        await AsyncDatabase(url).startup()
    assert "hush" not in str(caught.value)
    assert "***" not in str(caught.value).partition("reached:")[2]


@pytest.mark.parametrize("database_class", [AsyncDatabase, SyncDatabase])
@pytest.mark.parametrize(
    ("option", "reason"),
    [("autoflash", "autoflash"), ("autocommit", "autocommit"), ("binds", "'bool' object")],
)
def test_session_options_that_cannot_work_are_refused_at_once(
    database_class: type[AnyDatabase], option: str, reason: str
) -> None:
    """The error is raised when the database is described, not at the first request."""
    wrong: Any = {option: True}
    with pytest.raises(ConfigurationError, match=rf"session options.*{reason}"):
        database_class("sqlite://", session_options=wrong)


async def test_begin_commits_without_autobegin_too(real: Real) -> None:
    """SQLAlchemy accepts this session option, but an empty COMMIT would fail because of it."""
    async with real.describe(session_options={"autobegin": False}) as database:
        if isinstance(database, SyncDatabase):
            with database.begin() as session, session.begin():
                session.execute(ENTRY.insert().values(note="kept"))
        else:
            async with database.begin() as async_session, async_session.begin():
                await async_session.execute(ENTRY.insert().values(note="kept"))
    assert real.stored() == ["kept"]
