"""Requests that Hypothesis makes up, and the databases to run them on with and without BEGIN."""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mariadb_server
import postgres
from anyio import to_thread
from asgi import Exchange, respond
from conftest import AnyDatabase, checked_out
from hypothesis import strategies as st
from made_up_steps import (
    DEFINITIONS,
    DO,
    FATAL,
    METADATA,
    NOTE,
    ON_MARIADB,
    OTHERS,
    OTHERS_ON_MARIADB,
    PLAIN,
    WRITER,
    WRITER_ON_MARIADB,
)
from mariadb_server import NO_TLS
from sqlalchemy import URL, Connection, Engine, Result, create_engine, event, select, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, SyncDatabase, UnitReport

POSTGRESQL, MARIADB = ("asyncpg", "psycopg", "psycopg-sync"), ("asyncmy", "pymysql-sync")
KINDS = (*POSTGRESQL, *MARIADB)
# The second database object of a request is for the same database, or for another of this server.
MAIN, SAME, OTHER = "main", "same", "other"
OPEN = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
    "AND backend_type = 'client backend' AND xact_start IS NOT NULL AND pid <> pg_backend_pid()"
)
OPEN_ON_MARIADB = text(
    "SELECT count(*) FROM information_schema.innodb_trx JOIN information_schema.processlist "
    "ON id = trx_mysql_thread_id WHERE db = database() AND id <> connection_id()"
)
IN_DOUBT = text("SELECT gid FROM pg_prepared_xacts")
IN_DOUBT_ON_MARIADB = text("XA RECOVER")


@dataclass(frozen=True)
class Step:
    """One operation of a request."""

    do: str
    caught: bool = True
    on_second: bool = False


@dataclass(frozen=True)
class Case:
    """A request, and how it ends: by a status, or by an exception if that is 0."""

    steps: tuple[Step, ...]
    status: int = 201
    has_tenant: bool = False
    read_only: bool = False
    second: str = ""
    two_phase: bool = False
    has_reports: bool = True

    @property
    def names(self) -> list[str]:
        """Which databases the middleware gets."""
        return [MAIN, self.second] if self.second else [MAIN]


RARELY = st.sampled_from([False, False, False, True])


def cases_of(others: Iterable[str], writer: Iterable[str]) -> st.SearchStrategy[Case]:
    """Make up requests.

    Args:
        others: The operations that are more than plain reads.
        writer: What somebody else does meanwhile.
    """
    reads = st.builds(Step, st.sampled_from(sorted([*PLAIN, *writer])), on_second=st.booleans())
    all_steps = st.one_of(
        st.builds(Step, st.sampled_from(sorted(PLAIN)), on_second=st.booleans()),
        st.builds(
            Step,
            st.sampled_from(sorted([*PLAIN, *others])),
            st.sampled_from([True, True, False]),
            st.booleans(),
        ),
        st.builds(Step, st.sampled_from(sorted(writer))),
        st.builds(Step, st.sampled_from(sorted([*PLAIN, *others, *FATAL])), st.just(False)),
    )
    return st.builds(
        Case,
        st.tuples(st.lists(reads, max_size=3), st.lists(all_steps, min_size=1, max_size=8)).map(
            lambda parts: (*parts[0], *parts[1])
        ),
        st.sampled_from([201, 201, 201, 409, 0]),
        has_tenant=RARELY,
        read_only=RARELY,
        second=st.sampled_from(["", "", SAME, OTHER]),
        two_phase=RARELY,
        has_reports=st.booleans(),
    )


CASES = cases_of(OTHERS, WRITER)
CASES_ON_MARIADB = cases_of(OTHERS_ON_MARIADB, WRITER_ON_MARIADB)


def steps(*names: str, **options: Any) -> Case:
    """A request of these operations; `2:` before one of them means the second database object."""
    made = [Step(each.removeprefix("2:"), on_second=each.startswith("2:")) for each in names]
    return Case(tuple(made), **options)


class Broken(Exception):
    """What an application raises."""


@dataclass
class Bench:
    """Databases, each described twice, and the second writer to each of them."""

    runner: asyncio.Runner
    databases: dict[bool, dict[str, AnyDatabase]]
    engines: dict[str, Engine]

    @property
    def is_asyncpg(self) -> bool:
        return self.databases[True][MAIN].engine.dialect.driver == "asyncpg"

    @property
    def is_mariadb(self) -> bool:
        return is_mariadb(self.databases[True][MAIN])

    @property
    def cases(self) -> st.SearchStrategy[Case]:
        """Requests for this kind of database."""
        return CASES_ON_MARIADB if self.is_mariadb else CASES

    @contextmanager
    def begun_anew(self) -> Iterator[dict[str, Connection]]:
        """Yield the connections of the second writer, once all is as at first."""
        with ExitStack() as stack:
            writers = {}
            for name, engine in self.engines.items():
                writer = writers[name] = stack.enter_context(engine.connect())
                # InnoDB keeps deleted rows for a while, and locks them.
                empty = "TRUNCATE note" if self.is_mariadb else "DELETE FROM note"
                writer.execute(text(empty))
                first = {1: "taken", 2: "second", 3: "third"}
                writer.execute(
                    NOTE.insert(), [{"id": id_, "text": each} for id_, each in first.items()]
                )
            yield writers


@dataclass
class Outcome:
    """All that can be seen of a request: `stored` after each step, and after the end."""

    results: list[Any]
    status: int | None
    error: str
    stored: list[Any]
    reports: list[Any]


@dataclass
class Run:
    """A case come true."""

    case: Case
    databases: dict[str, AnyDatabase]
    writers: dict[str, Connection]
    was_delayed: bool = False
    results: list[Any] = field(default_factory=list)
    stored: list[Any] = field(default_factory=list)
    reports: list[UnitReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.is_mariadb = is_mariadb(self.databases[MAIN])
        self.used = [self.databases[each] for each in self.case.names]
        rule = partial(_always, self.case.read_only)
        options: Any = {"on_report": self.reports.append} if self.case.has_reports else {}
        self.exchange = Exchange(
            DBSessionMiddleware(
                self.app, *self.used, read_only=rule, two_phase=self.case.two_phase, **options
            )
        )

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        for number, step in enumerate(self.case.steps, 10):
            try:
                self.results.append(await self.perform(step, number))
            except Exception as error:
                self.results.append(type(error).__name__)
                if not step.caught:
                    raise
            self.look()
        if not self.case.status:
            raise Broken
        await respond(send, self.case.status)

    async def serve(self) -> None:
        """Run the request, with the listener that it wants."""
        set_tenant = _set_variable if self.is_mariadb else _set_tenant
        if self.case.has_tenant:
            event.listen(Session, "after_begin", set_tenant)
        try:
            await self.exchange.run()
        finally:
            if self.case.has_tenant:
                event.remove(Session, "after_begin", set_tenant)
        self.look()

    async def outcome(self) -> Outcome:
        await self.serve()
        self.assert_clean()
        exchange, reports = self.exchange, [self.seen(each) for each in self.reports]
        error = type(exchange.error).__name__
        return Outcome(self.results, exchange.status, error, self.stored, reports)

    def assert_clean(self) -> None:
        assert [checked_out(each) for each in self.used] == [0] * len(self.used)
        in_doubt = IN_DOUBT_ON_MARIADB if self.is_mariadb else IN_DOUBT
        assert self.writers[MAIN].execute(in_doubt).all() == []

    def open_transactions(self) -> int:
        query = OPEN_ON_MARIADB if self.is_mariadb else OPEN
        return sum(each.scalar(query) for each in self.writers.values())

    def look(self) -> None:
        """Note what is stored now."""
        query = select(NOTE).order_by(NOTE.c.id)
        found = [[tuple(row) for row in each.execute(query)] for each in self.writers.values()]
        self.stored.append(found)

    def seen(self, report: UnitReport) -> Any:
        """All of a report but its times and its places."""
        databases = [
            (self.used.index(each.database), each.committed, each.statements)
            for each in report.databases
        ]
        error = type(report.error).__name__
        return report.outcome, report.reason, error, databases, report.read_only

    async def perform(self, step: Step, number: int) -> Any:
        if step.do in WRITER:
            statement = (WRITER_ON_MARIADB if self.is_mariadb else WRITER)[step.do]
            result = self.writers[MAIN].execute(text(statement.format(n=number)))
            return result.scalar() if result.returns_rows else result.rowcount
        database = self.used[-1 if step.on_second else 0]
        work = partial(self.work, step=step, number=number)
        if isinstance(database, SyncDatabase):
            return await to_thread.run_sync(lambda: work(database.get_session()))
        return await database.get_session().run_sync(work)

    def work(self, session: Any, step: Step, number: int) -> Any:
        found = DO[step.do](session, number)
        found = "done" if isinstance(found, Result | tuple) else found
        open_connections = session._companion.open_connections
        if open_connections and step.do in PLAIN and not is_in_transaction(open_connections[-1]):
            self.was_delayed = True
        return found


def is_in_transaction(connection: Connection) -> bool:
    """What the driver knows of its connection, without asking the server."""
    driver: Any = connection.connection.driver_connection
    if hasattr(driver, "get_autocommit"):  # MariaDB: each statement begins one if it is off
        return not driver.get_autocommit()
    if hasattr(driver, "is_in_transaction"):
        return bool(driver.is_in_transaction())
    return bool(driver.info.transaction_status.name != "IDLE")


def _always(answer: bool, _scope: Any) -> bool:
    return answer


def _set_tenant(_session: Any, _transaction: Any, connection: Connection) -> None:
    connection.exec_driver_sql("SET LOCAL app.tenant = 'listener'")


def _set_variable(_session: Any, _transaction: Any, connection: Connection) -> None:
    connection.exec_driver_sql("SET @tenant = 'listener'")


def is_mariadb(database: AnyDatabase) -> bool:
    return database.url.get_backend_name() == "mysql"


def new_urls(kind: str, name: str) -> dict[str, URL]:
    """Make two databases with a view, and with a function that writes."""
    if kind in MARIADB:
        return _new_urls_on_mariadb(name)
    urls = {MAIN: postgres.new_database(name), OTHER: postgres.new_database(f"{name}_other")}
    for url in urls.values():
        engine = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
        with engine.begin() as connection:
            METADATA.create_all(connection)
            connection.execute(text(DEFINITIONS))
            # Two sessions of one request would wait for each other forever.
            connection.execute(text(f"ALTER DATABASE {url.database} SET lock_timeout = '20ms'"))
    return urls


def _new_urls_on_mariadb(name: str) -> dict[str, URL]:
    urls = {}
    for key, database in ((MAIN, name), (OTHER, f"{name}_other")):
        urls[key], administrator_url = mariadb_server.new_database(database)
        engine = create_engine(administrator_url, connect_args=NO_TLS, poolclass=NullPool)
        with engine.begin() as connection:
            METADATA.create_all(connection)
            for each in ON_MARIADB:
                connection.execute(text(each))
    return urls


def writer_of(url: URL) -> Engine:
    """Make the engine of the second writer."""
    options: dict[str, Any] = {"options": "-c lock_timeout=0"}
    driver = "postgresql+psycopg"
    if url.get_backend_name() == "mysql":
        # An ordinary user may not see the transactions of others.
        driver, url = "mysql+pymysql", url.set(username="root")
        waits = "SET innodb_lock_wait_timeout = 9, lock_wait_timeout = 9"
        options = {**NO_TLS, "init_command": waits}
    return create_engine(
        url.set(drivername=driver), isolation_level="AUTOCOMMIT", connect_args=options
    )


@contextmanager
def opened_bench(kind: str, urls: dict[str, URL]) -> Iterator[Bench]:
    """For all sequences: what one leaves behind on the connection, the next one stumbles over."""
    driver = kind.removesuffix("-sync")
    database_class: Any = SyncDatabase if kind.endswith("-sync") else AsyncDatabase
    dialect = urls[MAIN].get_backend_name()
    options: Any = {}
    if kind in MARIADB:
        # Two sessions of one request would wait for each other forever.
        arguments: dict[str, Any] = {"init_command": "SET innodb_lock_wait_timeout = 0"}
        arguments |= NO_TLS if driver == "pymysql" else {}
        options = {"isolation_level": "READ COMMITTED", "connect_args": arguments}
    databases = {
        wanted: {
            name: database_class(
                url.set(drivername=f"{dialect}+{driver}"),
                autocommit_reads=(True if kind in MARIADB else None) if wanted else False,
                pool_size=1,
                max_overflow=0,
                **options,
            )
            for name, url in {**urls, SAME: urls[MAIN]}.items()
        }
        for wanted in (True, False)
    }
    engines = {name: writer_of(url) for name, url in urls.items()}
    with asyncio.Runner() as runner:
        every = [each for described in databases.values() for each in described.values()]
        for database in every:
            runner.run(database.startup())
        yield Bench(runner, databases, engines)
        for database in every:
            runner.run(database.shutdown())
    for engine in engines.values():
        engine.dispose()
