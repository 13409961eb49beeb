"""Real databases for the tests: SQLite files, PostgreSQL and MariaDB, each with its drivers."""

import asyncio
import gc
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mariadb_server
import postgres
import pytest
import sqlalchemy
from anyio import to_thread
from hypothesis import settings
from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Executable,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.pool import NullPool

from asgi_dbsession import AsyncDatabase, SyncDatabase

pytest_plugins = ["matrix", "replicated_shop"]

# The version of SQLAlchemy under test.
SQLALCHEMY = tuple(map(int, sqlalchemy.__version__.split(".")[:3]))
# Older versions leave a connection open if the task is cancelled while they prepare the connection
# for its first use.
CLOSES_NEW_CONNECTIONS = SQLALCHEMY >= (2, 0, 53)

# By default each run uses the same examples; an environment variable asks for many new examples.
settings.register_profile("short", max_examples=400, derandomize=True, deadline=None, database=None)
settings.register_profile("quick", settings.get_profile("short"), max_examples=100)
settings.register_profile("long", max_examples=5000, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

METADATA = MetaData()
ENTRY = Table(
    "entry",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("note", Text().with_variant(String(255), "mysql", "mariadb"), unique=True),
)
# Work that only COMMIT can refuse. MariaDB has no such work, because it checks each constraint at
# once.
CHILD = Table(
    "child",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column(
        "entry_id", ForeignKey("entry.id", deferrable=True, initially="DEFERRED"), nullable=False
    ),
)

AnyDatabase = AsyncDatabase[Any] | SyncDatabase[Any]
KINDS = ("sqlite", "sqlite-sync", "asyncpg", "psycopg", "psycopg-sync")
# A test module with `KINDS = WITH_MARIADB` runs on these kinds instead.
WITH_MARIADB = (*KINDS, "asyncmy", "pymysql-sync")
_MARIADB = ("asyncmy", "aiomysql", "pymysql-sync")
# The kinds that `--quick` keeps: SQLite, an async driver and a blocking driver.
_QUICK_KINDS = ("sqlite", "asyncpg", "psycopg-sync")
# The tests that `--quick` skips: tests of other programs, other libraries, the documentation, and
# the parts of the package that no promise needs (for example, reports and retries).
_SLOW_FOLDERS = ("servers", "frameworks", "libraries")
_SLOW_MODULES = """
    audit benchmarks capacity comparison drivers example faults forks galera growing_guides
    guides health hosting_providers idle kept_bodies live live_in_a_browser matrix migrations
    observability_guide overload package postgresql_guide races read_only_guide readme
    reads_mariadb replicas replicas_at_work replicas_failover replicas_guide replicas_lost
    report retry retry_on run_transaction server_timing shop site site_in_a_browser slow_uploads
    tenants testing testing_guide tokens tutorial when_it_goes_wrong workers
"""
_SLOW = {*_SLOW_FOLDERS, *(f"test_{each}.py" for each in _SLOW_MODULES.split())}


def set_up_sqlite(connection: Any, _record: Any) -> None:
    """Let SQLite check foreign keys, as the other databases do, and not wait for the disk."""
    connection.execute("PRAGMA foreign_keys = ON")
    # The tests kill processes, but not the machine.
    connection.execute("PRAGMA synchronous = OFF")


@dataclass
class Real:
    """A database under test, and a second connection that sees what is stored."""

    kind: str
    url: URL
    reader: Engine
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_sync(self) -> bool:
        """True if it is tested with blocking sessions."""
        return self.kind.endswith("-sync")

    @property
    def is_sqlite(self) -> bool:
        """True if no server is behind it."""
        return self.kind.startswith("sqlite")

    @property
    def is_mariadb(self) -> bool:
        """True if MariaDB is behind it."""
        return self.kind in _MARIADB

    @property
    def is_postgresql(self) -> bool:
        """True if PostgreSQL is behind it."""
        return not self.is_sqlite and not self.is_mariadb

    @property
    def refusal(self) -> type[DBAPIError]:
        """Return the error that COMMIT raises after `Running.doom`."""
        return OperationalError if self.is_mariadb else IntegrityError

    def describe(self, **options: Any) -> AnyDatabase:
        """Describe the database for the middleware."""
        options = self.options | options
        if self.is_sqlite:
            options.setdefault("pool_events", [(set_up_sqlite, "connect")])
        database_class = SyncDatabase if self.is_sync else AsyncDatabase
        return database_class(self.url, **options)

    def look(self) -> Connection:
        """Return a connection that reads without BEGIN and ROLLBACK, which take time."""
        connection = self.reader.connect()
        if self.is_postgresql:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        return connection

    def stored(self) -> list[str]:
        """Return the notes of all rows that are stored."""
        with self.look() as connection:
            return list(connection.scalars(select(ENTRY.c.note).order_by(ENTRY.c.id)))

    def open_transactions(self) -> int:
        """Return how many sessions on the server are inside a transaction."""
        if self.is_mariadb:
            # A session that has used the table keeps a lock on the table until its transaction
            # ends.
            with self.reader.connect() as connection:
                try:
                    connection.execute(text("LOCK TABLE entry WRITE NOWAIT"))
                except OperationalError:
                    return 1
                connection.execute(text("UNLOCK TABLES"))
            return 0
        if self.is_sqlite:
            # An open transaction would still hold its lock.
            with self.reader.connect() as connection:
                connection.exec_driver_sql("PRAGMA busy_timeout = 0")
                try:
                    connection.exec_driver_sql("BEGIN EXCLUSIVE")
                except OperationalError:
                    return 1
                connection.rollback()
            return 0
        with self.look() as connection:
            return int(
                connection.scalar(
                    text(
                        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                        "AND pid <> pg_backend_pid() AND state <> 'idle'"
                    )
                )
                or 0
            )

    def await_unused(self) -> None:
        """Wait until the server has ended the connections of earlier tests, or end them.

        The traceback of a failed test may keep its connection until all tests have run.
        """
        deadline = time.monotonic() + 2
        pause = 0.001  # a connection that was closed ends after a few of them
        while self.connections():
            if time.monotonic() > deadline:
                self.kill()
                return
            if pause > 0.05:
                gc.collect()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def connections(self) -> int:
        """Return how many connections the server has, without our own connection."""
        if self.is_mariadb:
            query = (
                "SELECT count(*) FROM information_schema.processlist "
                "WHERE db = database() AND id <> connection_id()"
            )
            with self.reader.connect() as connection:
                return int(connection.scalar(text(query)) or 0)
        with self.look() as connection:
            return int(
                connection.scalar(
                    text(
                        "SELECT count(*) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                )
                or 0
            )

    def kill(self) -> None:
        """End every connection except our own, as a failover would."""
        with self.reader.connect() as connection:
            if self.is_mariadb:
                query = (
                    "SELECT id FROM information_schema.processlist "
                    "WHERE db = database() AND id <> connection_id()"
                )
                for number in connection.scalars(text(query)).all():
                    with suppress(OperationalError):  # it has just ended by itself
                        connection.execute(text(f"KILL {number}"))
            else:
                query = (
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
                connection.execute(text(query))

    def read_only(self, state: str) -> None:
        """Let MariaDB refuse writes of ordinary users, COMMIT included (`ON`), or not (`OFF`)."""
        with self.reader.connect() as connection:
            connection.execute(text(f"SET GLOBAL read_only = {state}"))

    async def assert_clean(self, database: AnyDatabase) -> None:
        """Check that no connection is checked out and no transaction is open on the server."""
        if self.is_mariadb:
            self.read_only("OFF")
        assert checked_out(database) == 0
        await becomes_true(lambda: self.open_transactions() == 0)


def checked_out(database: AnyDatabase) -> int:
    """Return how many connections are checked out of the pool."""
    pool: Any = database.engine.pool
    return int(pool.checkedout())


def forget_modules(*names: str) -> None:
    """Import these modules and their submodules again inside the block."""
    for each in list(sys.modules):
        if any(each == name or each.startswith(f"{name}.") for name in names):
            del sys.modules[each]


async def becomes_true(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until another process has done something; fail if it never happens."""
    deadline = time.monotonic() + seconds
    pause = 0.001
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.02)


@dataclass
class Running:
    """A running database, with one interface for all kinds of databases."""

    real: Real
    database: AnyDatabase

    async def execute(self, statement: Executable, database: AnyDatabase | None = None) -> Any:
        """Run a statement on the session of the current request, as a handler would."""
        return await self.call("execute", statement, database=database)

    async def call(self, operation: str, *args: Any, database: AnyDatabase | None = None) -> Any:
        """Call a method of this session, in a thread if the method blocks."""
        database = database or self.database

        def in_thread() -> Any:
            return getattr(database.get_session(), operation)(*args)

        if isinstance(database, SyncDatabase):
            return await to_thread.run_sync(in_thread)
        return await getattr(database.get_session(), operation)(*args)

    async def write(self, note: str) -> None:
        """Store a row."""
        await self.execute(ENTRY.insert().values(note=note))

    async def doom(self) -> None:
        """Do work that COMMIT will refuse."""
        if not self.real.is_mariadb:
            await self.execute(CHILD.insert().values(entry_id=-1))
            return
        # Make the server a replica for a moment, and a primary again after it has refused.
        await self.write("doomed")
        engine = self.database.engine
        event.listen(
            getattr(engine, "sync_engine", engine),
            "handle_error",
            lambda _: self.real.read_only("OFF"),
            once=True,
        )
        self.real.read_only("ON")

    def stored(self) -> list[str]:
        """Return the notes of all rows that are stored."""
        return self.real.stored()

    async def assert_clean(self) -> None:
        """Check that no connection is checked out and no transaction is open on the server."""
        await self.real.assert_clean(self.database)


@cache
def postgresql(name: str) -> tuple[URL, Engine]:
    """Make one database with its tables for the whole test run."""
    url = postgres.new_database(name)
    reader = create_engine(
        url.set(drivername="postgresql+psycopg"), pool_size=1, pool_pre_ping=True
    )
    METADATA.create_all(reader)
    return url, reader


@cache
def maria_database() -> tuple[URL, Engine]:
    """Make one MariaDB database for the whole test run."""
    url, administrator_url = mariadb_server.new_database("tests")
    reader = create_engine(
        administrator_url,
        pool_size=1,
        pool_pre_ping=True,
        isolation_level="AUTOCOMMIT",
        connect_args=mariadb_server.NO_TLS,
    )
    METADATA.create_all(reader, tables=[ENTRY])
    return url, reader


@cache
def empty_sqlite_file() -> bytes:
    """Return the content of a SQLite file with empty tables: copying it takes no time."""
    engine = create_engine("sqlite://")
    METADATA.create_all(engine)
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        content: bytes = driver.serialize()
    engine.dispose()
    return content


def real_database(kind: str, folder: Path, name: str = "tests") -> Real:
    """Make an empty database of this kind; on PostgreSQL with this name."""
    if kind.startswith("sqlite"):
        file = folder / "test.db"
        file.write_bytes(empty_sqlite_file())
        url = URL.create("sqlite", database=str(file))
        return Real(kind, url, create_engine(url, poolclass=NullPool))
    driver = kind.removesuffix("-sync")
    if kind in _MARIADB:
        url, reader = maria_database()
        with reader.begin() as connection:
            connection.execute(delete(ENTRY))
        options = {"connect_args": mariadb_server.NO_TLS} if driver == "pymysql" else {}
        return Real(kind, url.set(drivername=f"mysql+{driver}"), reader, options)
    url, reader = postgresql(name)
    real = Real(kind, url.set(drivername=f"postgresql+{driver}"), reader)
    with real.look() as connection:
        connection.exec_driver_sql("DELETE FROM child; DELETE FROM entry")
    return real


@pytest.fixture
def anyio_backend() -> str:
    """SQLAlchemy's async sessions run on asyncio only."""
    return "asyncio"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--quick`, to be run after every change."""
    parser.addoption(
        "--quick", action="store_true", help="test the promises only, with few drivers"
    )


def pytest_configure(config: pytest.Config) -> None:
    """With `--quick`, make up fewer cases."""
    if config.option.quick:
        settings.load_profile("quick")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--quick`, leave out slow modules and folders, except those named in the command."""
    named = {Path(each.partition("::")[0]).name for each in config.args}
    is_left_out = config.option.quick and collection_path.name in _SLOW - named
    return True if is_left_out else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--quick`, skip the drivers that behave like other tested drivers."""
    if not config.option.quick:
        return
    config.hook.pytest_deselected(items=[each for each in items if _is_repeated(each)])
    items[:] = [each for each in items if not _is_repeated(each)]


def _is_repeated(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    values = [each[0] if isinstance(each, tuple) and each else each for each in parameters]
    kinds = {kind for each in values if isinstance(each, str) for kind in each.split(" + ")}
    return bool(kinds & {*WITH_MARIADB, *_MARIADB} - {*_QUICK_KINDS})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on the kinds of databases that the test or its module names."""
    marks = metafunc.definition.iter_markers("parametrize")
    if "real" in metafunc.fixturenames and all(mark.args[0] != "real" for mark in marks):
        kinds = getattr(metafunc.module, "KINDS", KINDS)
        metafunc.parametrize("real", kinds, indirect=True)


@pytest.fixture
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Real]:
    """An empty database of each kind; the test runs once for each."""
    database = real_database(request.param, tmp_path)
    if not database.is_sqlite:
        database.await_unused()
    yield database
    if database.is_sqlite:
        database.reader.dispose()


@pytest.fixture
def asked(request: pytest.FixtureRequest) -> None:
    """Ask for reads without a transaction on MariaDB, where they need an option."""
    real = request.getfixturevalue("real") if "real" in request.fixturenames else None
    if isinstance(real, Real) and real.is_mariadb:
        real.options |= {"autocommit_reads": True, "isolation_level": "READ COMMITTED"}


@pytest.fixture
async def running(real: Real) -> AsyncIterator[Running]:
    """A running database of each kind, checked after the test."""
    async with real.describe() as database:
        yield Running(real, database)
        await real.assert_clean(database)


# How many modules were imported when objects were last excluded from garbage collections, and how
# many tests have run since.
_excluded = {"modules": 0, "tests": 0}


@pytest.fixture(autouse=True)
def no_leaks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test that leaves work to the garbage collector, or writes to the log of the pool."""
    yield
    gc.collect()
    complaints = [
        record.getMessage()
        for record in (*caplog.get_records("call"), *caplog.records)
        if record.name.startswith(("sqlalchemy.pool", "asyncio"))
        and record.levelno >= logging.ERROR
    ]
    assert not complaints


@pytest.fixture
def no_collections() -> Iterator[None]:
    """Find connections and cursors that only the garbage collector would close."""
    gc.disable()
    yield
    gc.enable()


def pytest_collection_finish() -> None:
    """Exclude the objects of the imported test modules from later garbage collections."""
    _exclude_old_objects()


def pytest_runtest_logfinish() -> None:
    """Exclude the objects that tests have left; the fixtures of the last test are free by now."""
    _excluded["tests"] += 1
    _exclude_old_objects()


def _exclude_old_objects() -> None:
    """Exclude all objects from later garbage collections, after an import or twenty tests.

    A collection reads every object that is not excluded. Half of the time of all tests was spent on
    the objects of libraries, and a tenth on those that the tests before had left in caches.
    """
    if len(sys.modules) > _excluded["modules"] or _excluded["tests"] >= 20:
        _excluded.update(modules=len(sys.modules), tests=0)
        gc.collect()
        gc.freeze()
