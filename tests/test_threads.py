"""What `def` handlers did is ended in one other thread; in none, where nothing is to be sent."""

import asyncio
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from anyio import to_thread
from asgi import get, respond
from conftest import ENTRY, Real, checked_out, real_database
from several import Entry
from sqlalchemy import event, func, select, text
from sqlalchemy.orm import Session

from asgi_dbsession import (
    ConfigurationError,
    DBSessionMiddleware,
    NoSession,
    SessionClosed,
    SyncDatabase,
    on_commit,
)
from asgi_dbsession.database import engines, sync_database
from asgi_dbsession.unit.current import current_unit

pytestmark = pytest.mark.anyio
KINDS = ("sqlite-sync", "psycopg-sync")
# The threads that committed.
ENDED_BY: list[int] = []


class SQLite(sqlite3.Connection):
    """A connection that records which thread commits."""

    def commit(self) -> None:
        ENDED_BY.append(threading.get_ident())
        super().commit()


class PostgreSQL(psycopg.Connection[Any]):
    """The same."""

    def commit(self) -> None:
        ENDED_BY.append(threading.get_ident())
        super().commit()


def describe(real: Real, **options: Any) -> SyncDatabase:
    """The database, with connections that record."""
    if real.is_sqlite:
        return SyncDatabase(real.url, connect_args={"factory": SQLite}, **options)
    dsn = real.url.set(drivername="postgresql").render_as_string(hide_password=False)
    return SyncDatabase(real.url, creator=lambda: PostgreSQL.connect(dsn), **options)


async def ends_by(
    work: Callable[[Session], Any], *databases: SyncDatabase, status: int = 200, **options: Any
) -> list[bool]:
    """Whether each COMMIT of a request was done on the thread of the event loop."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for database in databases:
            await to_thread.run_sync(lambda each: work(each.get_session()), database)
        await respond(send, status)

    ENDED_BY.clear()
    exchange = await get(DBSessionMiddleware(app, *databases, **options))
    assert (exchange.status, exchange.error) == (status, None)
    assert len(set(ENDED_BY)) <= 1
    return [each == threading.get_ident() for each in ENDED_BY]


def execute(statement: Any) -> Callable[[Session], Any]:
    """Execute it."""
    return lambda session: session.execute(statement).all()


READ = execute(select(ENTRY))


async def test_what_only_reads_is_ended_without_another_thread(real: Real) -> None:
    """There is nothing to send, so nothing blocks the event loop."""
    async with describe(real) as database:
        assert await ends_by(READ, database) == [True]


@pytest.mark.parametrize(
    "work",
    [
        execute(ENTRY.insert().values(note="new").returning(ENTRY.c.id)),
        lambda session: session.connection().exec_driver_sql(
            "INSERT INTO entry (note) VALUES ('n')"
        ),
    ],
)
async def test_a_write_is_committed_in_another_thread(real: Real, work: Any) -> None:
    """COMMIT blocks."""
    async with describe(real) as database:
        assert await ends_by(work, database) == [False]
    assert len(real.stored()) == 1


@pytest.mark.parametrize("what", ["new", "changed", "deleted"])
async def test_what_is_not_flushed_yet_is_committed_in_another_thread(
    real: Real, what: str
) -> None:
    """The flush blocks too."""
    with real.reader.begin() as connection:
        connection.execute(ENTRY.insert().values(note="old"))

    def work(session: Session) -> None:
        entry = session.scalars(select(Entry)).one()
        if what == "new":
            session.add(Entry("new"))
        elif what == "changed":
            entry.note = "changed"
        else:
            session.delete(entry)

    async with describe(real) as database:
        assert await ends_by(work, database) == [False]
    expected = {"new": ["old", "new"], "changed": ["changed"], "deleted": []}
    assert real.stored() == expected[what]


async def test_a_transaction_that_reads_is_ended_in_another_thread(real: Real) -> None:
    """A function began it on the server."""
    async with describe(real) as database:
        ends = await ends_by(execute(select(func.lower("A"))), database)
        assert ends == [real.is_sqlite]  # where no transaction begins with a read


@pytest.mark.parametrize("name", ["before_commit", "after_commit", "after_soft_rollback"])
async def test_a_listener_of_the_application_runs_in_another_thread(real: Real, name: str) -> None:
    """It may block."""
    called = []

    def listen(*_: Any) -> None:
        called.append(threading.get_ident())

    event.listen(Session, name, listen)
    try:
        async with describe(real) as database:
            status = 409 if name == "after_soft_rollback" else 200
            ends = await ends_by(READ, database, status=status)
    finally:
        event.remove(Session, name, listen)
    assert not any(ends)
    assert called
    assert threading.get_ident() not in called


async def test_a_listener_of_the_pool_runs_in_another_thread(real: Real) -> None:
    """It may send a statement."""
    called = []
    async with describe(real) as database:
        event.listen(database.engine, "checkin", lambda *_: called.append(threading.get_ident()))
        assert await ends_by(READ, database) == [False]
    assert threading.get_ident() not in called


async def test_a_session_class_with_a_commit_of_its_own_runs_in_another_thread(real: Real) -> None:
    """It may block."""

    class Mine(Session):
        """What an application writes."""

        def commit(self) -> None:
            super().commit()

    async with describe(real, session_options={"class_": Mine}) as database:
        assert await ends_by(READ, database) == [False]


async def test_several_databases_are_ended_in_one_other_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, with one change of thread; with none, if all of them only read."""
    changes = []
    run_in_thread = engines.run_in_thread

    async def count(function: Any, *args: Any) -> Any:
        changes.append(function)
        return await run_in_thread(function, *args)

    monkeypatch.setattr(sync_database, "run_in_thread", count)
    reals = [real_database("psycopg-sync", tmp_path, name) for name in ("tests", "second")]
    first, second = (describe(each) for each in reals)
    insert = execute(ENTRY.insert().values(note="new").returning(ENTRY.c.id))
    async with first, second:
        changes.clear()
        assert not any(await ends_by(insert, first, second))
        assert len(changes) == 1
        assert await ends_by(READ, first, second) == [True, True]
        assert len(changes) == 1
    assert [each.stored() for each in reals] == [["new"], ["new"]]
    for each in reals:
        each.reader.dispose()


async def test_functions_given_to_on_commit_are_called_all_the_same(real: Real) -> None:
    """After the end without another thread, in a thread as ever."""
    called = []

    def work(session: Session) -> None:
        READ(session)
        on_commit(lambda: called.append(threading.get_ident()))

    async with describe(real) as database:
        assert await ends_by(work, database) == [True]
    assert len(called) == 1
    assert threading.get_ident() not in called


def interrupt() -> None:
    """Raise what a signal handler raises in the middle of a statement."""
    raise KeyboardInterrupt


async def test_an_interrupted_statement_leaves_no_connection_behind(real: Real) -> None:
    """SQLAlchemy has thrown the connection away, so nobody can ask it about its transaction."""

    def work(session: Session) -> None:
        event.listen(database.engine, "before_cursor_execute", lambda *_: interrupt(), once=True)
        with pytest.raises(KeyboardInterrupt):
            session.execute(select(ENTRY))

    async with describe(real) as database:
        await ends_by(work, database, status=400)
        assert checked_out(database) == 0
        with database.begin() as session:
            work(session)
            session.rollback()
        with pytest.raises(KeyboardInterrupt), database.begin() as session:
            event.listen(
                database.engine, "before_cursor_execute", lambda *_: interrupt(), once=True
            )
            session.execute(select(ENTRY))
        assert checked_out(database) == 0
        assert await ends_by(READ, database) == [True]


@pytest.mark.parametrize("real", KINDS, indirect=True)
async def test_a_block_that_is_open_in_one_thread_cannot_be_opened_in_another(real: Real) -> None:
    """Otherwise each thread might commit or roll back the work of the other."""
    with describe(real) as database:
        shared = database.begin()

        def open_too() -> None:
            with shared as session:
                session.execute(ENTRY.insert().values(note="mixed up"))

        for note in ("kept", "kept too"):
            with shared as session:
                session.execute(ENTRY.insert().values(note=note))
                with pytest.raises(ConfigurationError, match="at each place"):
                    await to_thread.run_sync(open_too)
    assert real.stored() == ["kept", "kept too"]


@pytest.mark.parametrize("real", ["sqlite-sync"], indirect=True)
async def test_a_block_that_is_interrupted_as_it_begins_is_not_current_afterwards(
    real: Real,
) -> None:
    """A session that `get_session()` returned outside of a block would never be committed."""

    def interrupt(_frame: Any, kind: str, function: Any) -> None:
        if kind == "c_return" and function == current_unit.set:
            sys.setprofile(None)
            raise KeyboardInterrupt

    database = SyncDatabase(real.url)
    with database:
        sys.setprofile(interrupt)
        with pytest.raises(KeyboardInterrupt), database.begin():
            pytest.fail("nothing has interrupted the block")
        with pytest.raises(NoSession):
            database.get_session()


async def test_a_commit_waits_for_an_operation_of_another_task_on_the_event_loop(
    real: Real,
) -> None:
    """The task began its operation in the thread that had asked for the commit, but after that."""
    slow = text(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50000) "
        "SELECT count(*) FROM n"
    )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def read() -> None:
            while not answered.is_set():
                session.execute(slow).all()
                await asyncio.sleep(0)

        answered = asyncio.Event()
        session = database.get_session()
        session.execute(ENTRY.insert().values(note=scope["path"]))
        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            await asyncio.sleep(0)
            await respond(send)
            answered.set()

    paths = [f"/{number}" for number in range(8)]
    async with describe(real) as database:
        for path in paths:
            exchange = await get(DBSessionMiddleware(app, database), path)
            assert (exchange.status, exchange.error) == (200, None)
    assert real.stored() == paths


async def test_a_session_that_opens_while_its_request_ends_is_closed_too(real: Real) -> None:
    """The thread gets an error. Otherwise nobody would commit its work or free its connection."""
    opening, ended = threading.Event(), threading.Event()
    threads: list[asyncio.Future[Any]] = []

    class Slow(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if threads:
                opening.set()
                ended.wait(10)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        threads.append(asyncio.ensure_future(asyncio.to_thread(database.get_session)))
        await asyncio.to_thread(opening.wait, 10)
        await respond(send)

    async with describe(real, session_options={"class_": Slow}) as database:
        exchange = await get(DBSessionMiddleware(app, database))
        ended.set()
        assert (exchange.status, exchange.error) == (200, None)
        with pytest.raises(SessionClosed):
            await threads[0]
