"""A commit of plain reads does all that the application can see of SQLAlchemy's `commit()`."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from asgi import get, respond
from conftest import CHILD, ENTRY, Real, Running, checked_out
from several import Entry
from sqlalchemy import Engine, create_engine, event, inspect, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_dbsession import (
    DBSessionMiddleware,
    ForbiddenWrite,
    SyncDatabase,
    on_commit,
    safe_methods,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("asked")]
POSTGRESQL = ("asyncpg", "psycopg", "psycopg-sync")
KINDS = (*POSTGRESQL, "asyncmy", "pymysql-sync")
SCOPE = {"type": "http", "method": "GET", "path": "/", "headers": []}
LISTENERS = {
    "the session class, before": ("class", "before_commit"),
    "the session class, after": ("class", "after_commit"),
    "the session class, at the end": ("class", "after_transaction_end"),
    "the session, before": ("session", "before_commit"),
    "the session, after": ("session", "after_commit"),
    "the session, at the end": ("session", "after_transaction_end"),
    "the engine": ("engine", "commit"),
    "the connection": ("connection", "commit"),
    "the pool, at checkin": ("pool", "checkin"),
    "the pool, at reset": ("pool", "reset"),
}


def orm_of(running: Running) -> Any:
    """Return the `sqlalchemy.orm.Session` of the request."""
    session: Any = running.database.get_session()
    return getattr(session, "sync_session", session)


WAITING = text(
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


COUNT_TASKS = """
import asyncio, sys
from sqlalchemy import column, insert, select, table
from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

entry, made = table("entry", column("note")), []
work = {"GET": select(entry), "POST": insert(entry).values(note="")}

def make_task(loop, coroutine, **options):
    made.append(coroutine)
    return asyncio.Task(coroutine, loop=loop, **options)

async def app(scope, receive, send):
    await get_session().execute(work[scope["method"]])
    asyncio.get_running_loop().set_task_factory(make_task)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    asyncio.get_running_loop().set_task_factory(None)
    await send({"type": "http.response.body"})

async def send(message): ...

async def tasks_of(served, method):
    made.clear()
    await served({"type": "http", "method": method, "path": "/"}, None, send)
    return len(made)

def instrument(engine):
    from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
    SQLAlchemyInstrumentor().instrument(engine=engine, skip_dep_check=True)

async def main():
    options = {"on_engine": instrument} if "instrumented" in sys.argv else {}
    async with AsyncDatabase(sys.argv[1], **options) as database:
        served = DBSessionMiddleware(app, database)
        counts = [await tasks_of(served, method) for method in ("GET", "POST")]
    print("reads {}, writes {}".format(*counts))

asyncio.run(main())
"""


async def get_nothing() -> Any:
    """Receive nothing, because the application does not ask."""


@pytest.fixture
def listen() -> Iterator[Any]:
    """Add listeners, and remove them after the test."""
    added: list[Any] = []

    def listen_to(*arguments: Any) -> None:
        event.listen(*arguments)
        added.append(arguments)

    yield listen_to
    for arguments in added:
        event.remove(*arguments)


@pytest.mark.parametrize("name", LISTENERS)
async def test_a_listener_is_called_before_the_response_and_may_wait(
    running: Running, name: str, listen: Any
) -> None:
    """On an async database a listener may send statements, which wait in a greenlet."""
    of, kind = LISTENERS[name]
    happened: list[str] = []

    def listener(*_: Any) -> None:
        if not isinstance(running.database, SyncDatabase):
            await_only(asyncio.sleep(0))
        happened.append("called")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        orm = orm_of(running)
        engine = orm.bind
        connection = orm._companion.connections[-1]
        targets = {"session": orm, "engine": engine, "connection": connection, "pool": engine.pool}
        if of != "class":
            listen(targets[of], kind, listener)
        await respond(send)

    if of == "class":
        listen(Session, kind, listener)

    async def send(message: Any) -> None:
        happened.append(message["type"])

    await DBSessionMiddleware(app, running.database)(SCOPE, get_nothing, send)
    assert happened[:2] == ["called", "http.response.start"]
    await running.assert_clean()


async def test_each_savepoint_is_committed_too(running: Running) -> None:
    """A savepoint without a statement is open when the response starts, and ends then."""
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        await running.call("commit")
        await running.call("begin_nested")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        orm = orm_of(running)
        found.extend([orm.in_transaction(), orm.in_nested_transaction()])
        await running.write("in the body")
        await send({"type": "http.response.body", "body": b""})

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.error is None
    assert found == [False, False]
    assert running.stored() == ["in the body"]


@pytest.mark.parametrize(("status", "expected"), [(200, "COMMIT"), (404, "ROLLBACK")])
async def test_the_log_of_the_engine_says_what_the_status_means(
    running: Running, status: int, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLAlchemy logs how the transaction ended, although nothing is sent to the server."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        await respond(send, status)

    with caplog.at_level("INFO", "sqlalchemy.engine.Engine"):
        await get(DBSessionMiddleware(app, running.database))
    ends = {each.message.split()[0] for each in caplog.records} & {"COMMIT", "ROLLBACK"}
    assert ends == {expected}


async def test_objects_expire_at_a_rollback_of_reads(running: Running) -> None:
    """As SQLAlchemy documents it: what runs after the rollback must read the rows again."""
    found: list[bool] = []
    with running.real.reader.begin() as connection:
        connection.execute(ENTRY.insert().values(note="read"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        read = (await running.execute(select(Entry))).scalars().one()
        await send({"type": "http.response.start", "status": 404, "headers": []})
        found.append(inspect(read).expired)
        await send({"type": "http.response.body"})

    assert (await get(DBSessionMiddleware(app, running.database))).error is None
    assert found == [True]


@pytest.mark.parametrize("expire", [True, False])
async def test_objects_expire_if_the_session_says_so(real: Real, *, expire: bool) -> None:
    """The option `expire_on_commit` of the session is obeyed."""
    found = []
    with real.reader.begin() as connection:
        connection.execute(ENTRY.insert().values(note="read"))
    async with real.describe(session_options={"expire_on_commit": expire}) as database:
        running = Running(real, database)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            read = (await running.execute(select(Entry))).scalars().one()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            found.append(inspect(read).expired)
            await send({"type": "http.response.body", "body": b""})

        exchange = await get(DBSessionMiddleware(app, database))
    assert exchange.error is None
    assert found == [expire]


async def test_a_commit_of_the_application_is_called(real: Real) -> None:
    """The session class of the application has a `commit()` of its own, which may write."""

    class Writing(Session):
        def commit(self) -> None:
            self.execute(ENTRY.insert().values(note="by commit"))
            super().commit()

    name = "class_" if real.is_sync else "sync_session_class"
    async with real.describe(session_options={name: Writing}) as database:
        running = Running(real, database)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await running.execute(select(ENTRY))
            await respond(send)

        exchange = await get(DBSessionMiddleware(app, database))
    assert exchange.error is None
    assert real.stored() == ["by commit"]


async def test_a_commit_that_replaces_the_sessions_own_is_called(running: Running) -> None:
    """The application has replaced `commit()` of this one session, as a spy in a test does."""
    happened: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        orm = orm_of(running)
        commit = orm.commit

        def spy() -> None:
            happened.append("called")
            commit()

        orm.commit = spy
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.error is None
    assert happened == ["called"]


async def test_a_transaction_of_the_application_goes_on(running: Running) -> None:
    """The session has read on a connection whose transaction the application ends itself."""

    def read(orm: Any) -> Any:
        connection = orm.bind.connect()
        begun = connection.begin()
        orm.execute(select(ENTRY), bind_arguments={"bind": connection})
        return connection, begun

    def write(connection: Any, begun: Any) -> None:
        connection.execute(ENTRY.insert().values(note="in the body"))
        begun.commit()
        connection.close()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        connection, begun = await greenlet_spawn(read, orm_of(running))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await greenlet_spawn(write, connection, begun)
        await send({"type": "http.response.body", "body": b""})

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.error is None
    assert running.stored() == ["in the body"]


async def test_a_transaction_that_the_application_has_ended_is_an_error(running: Running) -> None:
    """SQLAlchemy's `commit()` refuses it: the application ended it on the connection itself."""

    def read(orm: Any) -> None:
        connection = orm.execute(select(ENTRY)).connection
        connection.rollback()
        connection.begin()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await greenlet_spawn(read, orm_of(running))
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert isinstance(exchange.error, InvalidRequestError)
    assert exchange.messages == []


async def test_what_is_in_memory_is_stored(running: Running) -> None:
    """An object that was added after the reads is written by the commit."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        orm_of(running).add(Entry("added"))
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.error is None
    assert running.stored() == ["added"]


async def test_the_session_works_on_after_its_reads(running: Running) -> None:
    """The connection is in the pool while the response starts; a later write is committed."""
    found = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        found.append(checked_out(running.database))
        await running.execute(select(ENTRY))
        await running.write("in the body")
        await send({"type": "http.response.body", "body": b""})
        found.append(checked_out(running.database))

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.error is None
    assert found == [0, 0]
    assert running.stored() == ["in the body"]


@pytest.mark.parametrize("real", ["asyncpg"], indirect=True)
@pytest.mark.parametrize("kind", ["plain", "instrumented"])
def test_reads_are_committed_without_a_task(real: Real, kind: str) -> None:
    """A task costs time. The listeners of OpenTelemetry need none.

    In this process, other tests have used options that need a task.
    """
    url = real.url.render_as_string(hide_password=False)
    program = [sys.executable, "-c", COUNT_TASKS, url, kind]
    assert subprocess.check_output(program, text=True) == "reads 0, writes 1\n"


async def test_a_write_on_another_database_is_stored_before_the_response(running: Running) -> None:
    """One database was only read, and the request has written to the other one."""
    stored: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        await running.execute(ENTRY.insert().values(note="written"), database=other)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        stored.extend(running.stored())
        await send({"type": "http.response.body", "body": b""})

    async with running.real.describe() as other:
        exchange = await get(DBSessionMiddleware(app, running.database, other))
    assert exchange.error is None
    assert stored == ["written"]


@pytest.mark.parametrize("is_inner", [False, True])
async def test_on_commit_after_reads_is_called_before_the_response(
    running: Running, *, is_inner: bool
) -> None:
    """Also if an inner middleware has the database, and commits it before the outer one."""
    happened: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        on_commit(lambda: happened.append("called"))
        await respond(send)

    async def send(message: Any) -> None:
        happened.append(message["type"])

    async with running.real.describe() as other:
        served: Any = DBSessionMiddleware(app, running.database)
        if is_inner:
            served = DBSessionMiddleware(served, other)
        await served(dict(SCOPE), get_nothing, send)
    assert happened[:2] == ["called", "http.response.start"]


async def test_a_report_is_made_of_reads(running: Running) -> None:
    """The report comes before the response, and counts the statement."""
    happened: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        await respond(send)

    async def send(message: Any) -> None:
        happened.append(message["type"])

    served = DBSessionMiddleware(
        app, running.database, on_report=lambda report: happened.append(report.outcome)
    )
    await served(dict(SCOPE), get_nothing, send)
    assert happened[:2] == ["committed", "http.response.start"]


async def test_a_refused_write_fails_the_request_although_it_has_only_read(
    running: Running,
) -> None:
    """The application has caught the error, and answers as if nothing had happened."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        with suppress(ForbiddenWrite):
            await running.write("refused")
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database, read_only=safe_methods))
    assert exchange.status is None
    assert isinstance(exchange.error, ForbiddenWrite)


@pytest.mark.parametrize("real", POSTGRESQL, indirect=True)
async def test_the_response_waits_for_a_read_of_another_task(running: Running) -> None:
    """The read waits for a lock on the table, and the response starts after the read."""
    happened: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(Entry))
        await running.call("commit")

        with running.real.reader.begin() as connection:
            connection.exec_driver_sql("LOCK TABLE entry IN ACCESS EXCLUSIVE MODE")
            reading = asyncio.create_task(running.execute(select(ENTRY)))
            while not connection.execute(WAITING).scalar_one():
                await asyncio.sleep(0.01)
            responding = asyncio.create_task(respond(send))
            for _ in range(5):
                await asyncio.sleep(0)
            assert happened == []
        await reading
        await responding

    async def send(message: Any) -> None:
        happened.append(message["type"])

    await DBSessionMiddleware(app, running.database)(dict(SCOPE), get_nothing, send)
    assert happened == ["http.response.start", "http.response.body"]


async def test_a_reader_that_fails_after_the_commit_does_not_undo_later_work(
    running: Running,
) -> None:
    """Its reads are committed, so its failure says nothing about what another task does."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        has_read, has_started = asyncio.Event(), asyncio.Event()

        async def read() -> None:
            await running.execute(select(ENTRY))
            has_read.set()
            await has_started.wait()
            raise LookupError

        reading = asyncio.create_task(read())
        await has_read.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        has_started.set()
        with suppress(LookupError):
            await reading
        await running.write("in the body")
        await send({"type": "http.response.body", "body": b""})

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.error is None
    assert running.stored() == ["in the body"]


async def test_a_closed_connection_that_has_written_does_not_hide_behind_a_reader(
    real: Real,
) -> None:
    """The table `entry` has an engine of its own, whose connection is closed after the write."""
    far: Any = create_engine(real.url) if real.is_sync else create_async_engine(real.url)
    engine: Engine = getattr(far, "sync_engine", far)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        await greenlet_spawn(close, orm_of(running))
        await running.execute(select(CHILD))
        await respond(send, 201)

    def close(orm: Any) -> None:
        orm.connection(bind_arguments={"bind": engine}).close()

    async with real.describe(session_options={"binds": {ENTRY: far}}) as database:
        running = Running(real, database)
        exchange = await get(DBSessionMiddleware(app, database))
        await running.assert_clean()
    await greenlet_spawn(engine.dispose)
    assert (exchange.error is None, exchange.status) == (False, None)
    assert real.stored() == []


CONNECTIONS = text(
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid != pg_backend_pid()"
)


@pytest.mark.parametrize("real", POSTGRESQL, indirect=True)
@pytest.mark.parametrize("pool", ["no pool", "a full pool"])
async def test_a_connection_that_no_pool_keeps_is_closed(
    real: Real, pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An async driver waits for the server when it closes a connection."""
    options: dict[str, Any] = {"poolclass": NullPool}
    if pool == "a full pool":
        options = {"pool_size": 1, "max_overflow": 2}
    all_have_read = asyncio.Barrier(3)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        await all_have_read.wait()
        await respond(send)

    with real.reader.connect() as reader:
        before = reader.execute(CONNECTIONS).scalar_one()
        reader.rollback()
        async with real.describe(ping_on_startup=False, **options) as database:
            running = Running(real, database)
            middleware = DBSessionMiddleware(app, database)
            exchanges = await asyncio.gather(*(get(middleware) for _ in range(3)))
            kept = 0 if pool == "no pool" else 1
            for _ in range(200):
                left = reader.execute(CONNECTIONS).scalar_one() - before
                reader.rollback()
                if left == kept:
                    break
                await asyncio.sleep(0.01)
    assert [each.error for each in exchanges] == [None] * 3
    assert left == kept
    assert caplog.records == []


async def test_a_connection_of_a_pool_that_was_disposed_is_closed(
    real: Real, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine has a new pool, but the connections return to the old one, which is full."""
    all_have_read, is_disposed = asyncio.Barrier(3), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        await all_have_read.wait()
        await is_disposed.wait()
        await respond(send)

    async with real.describe(pool_size=1, max_overflow=2) as database:
        running = Running(real, database)
        middleware = DBSessionMiddleware(app, database)
        requests = [asyncio.create_task(get(middleware)) for _ in range(3)]
        while checked_out(database) < len(requests):
            await asyncio.sleep(0.01)
        engine: Any = database.engine
        sync_engine = getattr(engine, "sync_engine", engine)
        old = sync_engine.pool
        await greenlet_spawn(sync_engine.dispose)
        is_disposed.set()
        exchanges = await asyncio.gather(*requests)
        await greenlet_spawn(old.dispose)
    assert [each.error for each in exchanges] == [None] * 3
    assert caplog.records == []
