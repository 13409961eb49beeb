"""Whether BEGIN is delayed or not, any sequence of operations comes to the same.

Hypothesis makes up requests. Each runs twice against one PostgreSQL, beside a second writer: with
`autocommit_reads` and without. Many more:
`HYPOTHESIS_PROFILE=long python -m pytest -o timeout=0 -n 0 tests/test_reads_properties.py -s`.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import postgres
import pytest
from anyio import to_thread
from asgi import get, respond
from conftest import AnyDatabase, checked_out
from hypothesis import example, given, settings, strategies as st
from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    Result,
    Table,
    Text,
    create_engine,
    event,
    func,
    literal,
    literal_column,
    select,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, SyncDatabase
from asgi_dbsession.testing import rolled_back

# SQLAlchemy warns of objects that are added where only `rollback()` can follow; so it should.
pytestmark = pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active")

EXAMPLES = settings().max_examples
METADATA = MetaData()
NOTE = Table(
    "note", METADATA, Column("id", Integer, primary_key=True), Column("text", Text, unique=True)
)
VIEW = Table("note_view", MetaData(), Column("id", Integer), Column("text", Text))
DEFINITIONS = """
CREATE VIEW note_view AS SELECT id, text FROM note;
CREATE FUNCTION write_note(number int) RETURNS int LANGUAGE sql VOLATILE AS
    'INSERT INTO note VALUES (number, ''function '' || number) RETURNING id';
"""
FAILING = select(NOTE.c.id).where(literal(1) / literal(0) > 0)
ALL = select(NOTE.c.text).order_by(NOTE.c.text)
UPPER = func.upper(NOTE.c.text)
TENANT = "SELECT current_setting('app.tenant', true)"


class Base(DeclarativeBase):
    """Of what is added."""


class Note(Base):
    """A row, as an object."""

    __table__ = NOTE
    id: Mapped[int]
    text: Mapped[str]


def rows(session: Session, statement: Any, *args: Any) -> list[Any]:
    return [tuple(each) for each in session.execute(statement, *args)]


def rowcount(session: Session, statement: Any) -> int:
    result: Any = session.execute(statement)
    return int(result.rowcount)


def raw(session: Session, statement: str) -> None:
    """Work below SQLAlchemy, as with COPY."""
    driver: Any = session.connection().connection.driver_connection
    pending = driver.execute(statement)
    if hasattr(pending, "__await__"):
        await_only(pending)


def change(session: Session, number: int, *, flush: bool) -> None:
    found = session.scalars(select(Note).order_by(Note.id).limit(1)).first()
    if found is not None:
        found.text = f"changed {number}"
    if flush:
        session.flush()


def add(session: Session, number: int, *, flush: bool, text: str = "") -> None:
    session.add(Note(id=number, text=text or f"added {number}"))
    if flush:
        session.flush()


def savepoint(session: Session, number: int, *, kept: bool) -> list[Any]:
    nested = session.begin_nested()
    session.execute(NOTE.insert().values(id=number, text=f"nested {number}"))
    found = rows(session, ALL)
    nested.commit() if kept else nested.rollback()
    return found


def failing_savepoint(session: Session, number: int) -> list[Any]:
    with suppress(Exception), session.begin_nested():
        session.execute(NOTE.insert().values(id=number, text=f"gone {number}"))
        session.execute(FAILING)
    return rows(session, ALL)


def stream(session: Session, _number: int) -> list[Any]:
    result = session.execute(ALL, execution_options={"stream_results": True, "max_row_buffer": 1})
    return [tuple(each) for each in result.yield_per(1)]


def insert_in_cte(number: int) -> Any:
    insert = NOTE.insert().values(id=number, text=f"cte {number}").returning(NOTE.c.id)
    return select(insert.cte("inserted").c.id)


# What reads, and begins no transaction where BEGIN is delayed.
PLAIN: dict[str, Callable[[Session, int], Any]] = {
    "all": lambda session, _: rows(session, ALL),
    "count": lambda session, _: session.scalar(select(func.count(NOTE.c.id))),
    "view": lambda session, _: rows(session, select(VIEW.c.text).order_by(VIEW.c.text)),
    "objects": lambda session, _: sorted(each.text for each in session.scalars(select(Note))),
    "get": lambda session, _: getattr(session.get(Note, 1), "text", None),
}
OTHERS: dict[str, Callable[[Session, int], Any]] = {
    "function": lambda session, _: rows(session, select(UPPER).order_by(UPPER)),
    "writing function": lambda session, n: session.scalar(select(func.write_note(n))),
    "text": lambda session, _: rows(session, text("SELECT text FROM note ORDER BY text")),
    "literal column": lambda session, _: session.scalar(select(literal_column("40 + 2"))),
    "for update": lambda session, _: rows(session, ALL.with_for_update()),
    "cte": lambda session, _: rows(session, select(ALL.cte().c.text)),
    "writing cte": lambda session, n: session.scalar(insert_in_cte(n)),
    "lock": lambda session, _: session.scalar(select(func.pg_try_advisory_xact_lock(7))),
    "set local": lambda session, n: bool(session.execute(text(f"SET LOCAL app.tenant = '{n}'"))),
    "tenant": lambda session, _: session.scalar(text(TENANT)) or None,
    "stream": stream,
    "insert": lambda session, n: rowcount(
        session, NOTE.insert().values(id=n, text=f"inserted {n}")
    ),
    "update": lambda session, n: rowcount(
        session, NOTE.update().where(NOTE.c.id == 1).values(text=f"updated {n}")
    ),
    "delete": lambda session, _: rowcount(session, NOTE.delete().where(NOTE.c.id == 2)),
    "add": partial(add, flush=False),
    "flush": partial(add, flush=True),
    "change": partial(change, flush=False),
    "change and flush": partial(change, flush=True),
    "savepoint kept": partial(savepoint, kept=True),
    "savepoint undone": partial(savepoint, kept=False),
    "savepoint failed": failing_savepoint,
    "connection": lambda session, _: session.connection().closed,
    "raw": lambda session, n: raw(session, f"INSERT INTO note VALUES ({n}, 'raw {n}')"),
    "duplicate": lambda session, n: session.execute(NOTE.insert().values(id=n, text="taken")),
    "no such table": lambda session, _: session.execute(text("SELECT * FROM nowhere")),
    "failing function": lambda session, _: session.scalar(select(func.sqrt(-1))),
    "failing flush": partial(add, flush=True, text="taken"),
    "commit": lambda session, _: session.commit(),
    "rollback": lambda session, _: session.rollback(),
}
# A read that failed aborts no work after it, where there is no transaction: the page says so. So
# this one, alone of all, is never caught.
FATAL: dict[str, Callable[[Session, int], Any]] = {
    "failing read": lambda session, _: session.execute(FAILING)
}
# What somebody else does meanwhile. It waits for nobody.
WRITER = {
    "other inserts": "INSERT INTO note VALUES ({n} + 1000, 'other {n}')",
    "other updates": "UPDATE note SET text = 'other {n}' WHERE id IN "
    "(SELECT id FROM note WHERE id < 3 ORDER BY id FOR UPDATE SKIP LOCKED)",
    "other locks": "SELECT pg_try_advisory_xact_lock(7)",
}
CANCELLED = "cancelled read"
DO = {**PLAIN, **OTHERS, **FATAL}


@dataclass(frozen=True)
class Step:
    """One operation of a request."""

    do: str
    caught: bool = True


@dataclass(frozen=True)
class Case:
    """A request, and how it ends: by a status, or by an exception if that is 0."""

    steps: tuple[Step, ...]
    status: int = 201
    has_tenant: bool = False
    read_only: bool = False


STEPS = st.one_of(
    st.builds(Step, st.sampled_from(sorted(PLAIN))),
    st.builds(
        Step, st.sampled_from(sorted([*PLAIN, *OTHERS])), st.sampled_from([True, True, False])
    ),
    st.builds(Step, st.sampled_from(sorted(WRITER))),
    st.builds(Step, st.sampled_from(sorted([*PLAIN, *OTHERS, *FATAL])), st.just(False)),
)
READS = st.builds(Step, st.sampled_from(sorted([*PLAIN, *WRITER])))
CASES = st.builds(
    Case,
    st.tuples(st.lists(READS, max_size=3), st.lists(STEPS, min_size=1, max_size=8)).map(
        lambda parts: (*parts[0], *parts[1])
    ),
    st.sampled_from([201, 201, 201, 409, 0]),
    st.sampled_from([False, False, False, True]),
    st.sampled_from([False, False, False, True]),
)


class Broken(Exception):
    """What an application raises."""


class Cancelled(Exception):
    """What an application makes of a time-out."""


@dataclass
class Bench:
    """One database, described twice, and the second writer."""

    runner: asyncio.Runner
    databases: dict[bool, AnyDatabase]
    writer: Engine

    def begin_anew(self) -> Connection:
        connection = self.writer.connect()
        connection.execute(text("DELETE FROM note"))
        first = {1: "taken", 2: "second", 3: "third"}
        connection.execute(
            NOTE.insert(), [{"id": id_, "text": each} for id_, each in first.items()]
        )
        return connection


@dataclass
class Outcome:
    """All that can be seen of a request."""

    results: list[Any]
    status: int | None
    error: str
    stored: list[Any]


@dataclass
class Run:
    """A case come true."""

    case: Case
    database: AnyDatabase
    writer: Connection
    was_delayed: bool = False

    async def outcome(self) -> Outcome:
        results: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            for number, step in enumerate(self.case.steps, 10):
                try:
                    results.append(await self.perform(step, number))
                except Exception as error:
                    results.append(type(error).__name__)
                    if not step.caught:
                        raise
            if not self.case.status:
                raise Broken
            await respond(send, self.case.status)

        if self.case.has_tenant:
            event.listen(Session, "after_begin", _set_tenant)
        try:
            rule = partial(_always, self.case.read_only)
            exchange = await get(DBSessionMiddleware(app, self.database, read_only=rule))
        finally:
            if self.case.has_tenant:
                event.remove(Session, "after_begin", _set_tenant)
        assert checked_out(self.database) == 0
        stored = [tuple(each) for each in self.writer.execute(select(NOTE).order_by(NOTE.c.id))]
        return Outcome(results, exchange.status, type(exchange.error).__name__, stored)

    async def perform(self, step: Step, number: int) -> Any:
        if step.do in WRITER:
            result = self.writer.execute(text(WRITER[step.do].format(n=number)))
            return result.scalar() if result.returns_rows else result.rowcount
        if step.do == CANCELLED:
            return await self.read_cancelled()
        work = partial(self.work, step=step, number=number)
        if isinstance(self.database, SyncDatabase):
            return await to_thread.run_sync(lambda: work(self.database.get_session()))
        return await self.database.get_session().run_sync(work)

    async def read_cancelled(self) -> Any:
        if isinstance(self.database, SyncDatabase):
            raise Cancelled
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        try:
            await self.database.get_session().execute(ALL)
        except asyncio.CancelledError:
            task.uncancel()
            raise Cancelled from None

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


@pytest.fixture(scope="module")
def url() -> URL:
    """A database with a view, and with a function that writes."""
    url = postgres.new_database("reads_properties")
    engine = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with engine.begin() as connection:
        METADATA.create_all(connection)
        connection.execute(text(DEFINITIONS))
    return url


@pytest.fixture(params=["asyncpg", "psycopg", "psycopg-sync"])
def bench(request: pytest.FixtureRequest, url: URL) -> Iterator[Bench]:
    """For all sequences: what one leaves behind on the connection, the next one stumbles over."""
    driver = request.param.removesuffix("-sync")
    kind: Any = SyncDatabase if request.param.endswith("-sync") else AsyncDatabase
    databases = {
        wanted: kind(
            url.set(drivername=f"postgresql+{driver}"),
            autocommit_reads=None if wanted else False,
            pool_size=1,
            max_overflow=0,
        )
        for wanted in (True, False)
    }
    writer = create_engine(url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with asyncio.Runner() as runner:
        for database in databases.values():
            runner.run(database.startup())
        yield Bench(runner, databases, writer)
        for database in databases.values():
            runner.run(database.shutdown())
    writer.dispose()


def steps(*names: str) -> Case:
    return Case(tuple(Step(each) for each in names))


def test_no_application_can_tell(bench: Bench) -> None:
    """Results, classes of errors, the response, and the rows that are stored."""
    counts: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES // 6)
    @given(case=CASES)
    @example(steps("all", "other inserts", "all", "insert", "other updates", "all"))
    @example(steps("all", "set local", "tenant", "commit", "tenant", "all"))
    def compare(case: Case) -> None:
        outcomes = {}
        for wanted, database in bench.databases.items():
            with bench.begin_anew() as writer:
                run = Run(case, database, writer)
                outcomes[wanted] = bench.runner.run(run.outcome())
                assert wanted or not run.was_delayed
                counts["delayed"] += run.was_delayed
        counts["sequences"] += 1
        assert outcomes[True] == outcomes[False]
        if case.read_only:
            by_others = ("taken", "second", "third", "other")
            assert all(each[1].startswith(by_others) for each in outcomes[True].stored)

    compare()
    print(f"BEGIN was delayed in {counts['delayed']} of {counts['sequences']} requests")  # noqa: T201
    assert counts["delayed"] > counts["sequences"] // 4


def test_nor_inside_of_rolled_back(bench: Bench) -> None:
    """There, all share one transaction, and nothing is delayed."""

    @settings(max_examples=EXAMPLES // 20)
    @given(case=CASES)
    def compare(case: Case) -> None:
        outcomes = {}
        for wanted, database in bench.databases.items():
            with bench.begin_anew() as writer:
                writer.exec_driver_sql("SET lock_timeout = '100ms'")
                run = Run(case, database, writer)

                async def isolated(run: Run = run, database: Any = database) -> Outcome:
                    async with rolled_back(database):
                        return await run.outcome()

                outcomes[wanted] = bench.runner.run(isolated())
                assert not run.was_delayed
        assert outcomes[True] == outcomes[False]

    compare()
