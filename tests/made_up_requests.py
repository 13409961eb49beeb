"""Requests that Hypothesis makes up, and the databases to run them on with and without BEGIN."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import postgres
from anyio import to_thread
from asgi import Exchange, respond
from conftest import AnyDatabase, checked_out
from hypothesis import strategies as st
from made_up_steps import DEFINITIONS, DO, FATAL, METADATA, NOTE, OTHERS, PLAIN, WRITER
from sqlalchemy import URL, Connection, Engine, Result, create_engine, event, select, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, SyncDatabase, UnitReport

KINDS = ("asyncpg", "psycopg", "psycopg-sync")
# The second database object of a request is for the same database, or for another of this server.
MAIN, SAME, OTHER = "main", "same", "other"
OPEN = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
    "AND backend_type = 'client backend' AND xact_start IS NOT NULL AND pid <> pg_backend_pid()"
)
IN_DOUBT = text("SELECT count(*) FROM pg_prepared_xacts")


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
STEPS = st.one_of(
    st.builds(Step, st.sampled_from(sorted(PLAIN)), on_second=st.booleans()),
    st.builds(
        Step,
        st.sampled_from(sorted([*PLAIN, *OTHERS])),
        st.sampled_from([True, True, False]),
        st.booleans(),
    ),
    st.builds(Step, st.sampled_from(sorted(WRITER))),
    st.builds(Step, st.sampled_from(sorted([*PLAIN, *OTHERS, *FATAL])), st.just(False)),
)
READS = st.builds(Step, st.sampled_from(sorted([*PLAIN, *WRITER])), on_second=st.booleans())
CASES = st.builds(
    Case,
    st.tuples(st.lists(READS, max_size=3), st.lists(STEPS, min_size=1, max_size=8)).map(
        lambda parts: (*parts[0], *parts[1])
    ),
    st.sampled_from([201, 201, 201, 409, 0]),
    has_tenant=RARELY,
    read_only=RARELY,
    second=st.sampled_from(["", "", SAME, OTHER]),
    two_phase=RARELY,
    has_reports=st.booleans(),
)


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

    @contextmanager
    def begun_anew(self) -> Iterator[dict[str, Connection]]:
        """Yield the connections of the second writer, once all is as at first."""
        with ExitStack() as stack:
            writers = {}
            for name, engine in self.engines.items():
                writer = writers[name] = stack.enter_context(engine.connect())
                writer.execute(text("DELETE FROM note"))
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
        if self.case.has_tenant:
            event.listen(Session, "after_begin", _set_tenant)
        try:
            await self.exchange.run()
        finally:
            if self.case.has_tenant:
                event.remove(Session, "after_begin", _set_tenant)
        self.look()

    async def outcome(self) -> Outcome:
        await self.serve()
        self.assert_clean()
        exchange, reports = self.exchange, [self.seen(each) for each in self.reports]
        error = type(exchange.error).__name__
        return Outcome(self.results, exchange.status, error, self.stored, reports)

    def assert_clean(self) -> None:
        assert [checked_out(each) for each in self.used] == [0] * len(self.used)
        assert self.writers[MAIN].scalar(IN_DOUBT) == 0

    def open_transactions(self) -> int:
        return sum(each.scalar(OPEN) for each in self.writers.values())

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
            result = self.writers[MAIN].execute(text(WRITER[step.do].format(n=number)))
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
    if hasattr(driver, "is_in_transaction"):
        return bool(driver.is_in_transaction())
    return bool(driver.info.transaction_status.name != "IDLE")


def _always(answer: bool, _scope: Any) -> bool:
    return answer


def _set_tenant(_session: Any, _transaction: Any, connection: Connection) -> None:
    connection.exec_driver_sql("SET LOCAL app.tenant = 'listener'")


def new_urls(name: str) -> dict[str, URL]:
    """Make two databases with a view, and with a function that writes."""
    urls = {MAIN: postgres.new_database(name), OTHER: postgres.new_database(f"{name}_other")}
    for url in urls.values():
        engine = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
        with engine.begin() as connection:
            METADATA.create_all(connection)
            connection.execute(text(DEFINITIONS))
            # Two sessions of one request would wait for each other forever.
            connection.execute(text(f"ALTER DATABASE {url.database} SET lock_timeout = '20ms'"))
    return urls


@contextmanager
def opened_bench(kind: str, urls: dict[str, URL]) -> Iterator[Bench]:
    """For all sequences: what one leaves behind on the connection, the next one stumbles over."""
    driver = kind.removesuffix("-sync")
    database_class: Any = SyncDatabase if kind.endswith("-sync") else AsyncDatabase
    databases = {
        wanted: {
            name: database_class(
                url.set(drivername=f"postgresql+{driver}"),
                autocommit_reads=None if wanted else False,
                pool_size=1,
                max_overflow=0,
            )
            for name, url in {**urls, SAME: urls[MAIN]}.items()
        }
        for wanted in (True, False)
    }
    engines = {
        name: create_engine(
            url.set(drivername="postgresql+psycopg"),
            isolation_level="AUTOCOMMIT",
            connect_args={"options": "-c lock_timeout=0"},
        )
        for name, url in urls.items()
    }
    with asyncio.Runner() as runner:
        every = [each for described in databases.values() for each in described.values()]
        for database in every:
            runner.run(database.startup())
        yield Bench(runner, databases, engines)
        for database in every:
            runner.run(database.shutdown())
    for engine in engines.values():
        engine.dispose()
