"""Several databases in one request are stored all together, as far as possible."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from asgi import Exchange, Message, Socket, get, respond
from conftest import ENTRY, Real, Running, becomes_true, checked_out, real_database
from pages import Page
from several import Entry, Several, engine_of, in_session, orm, several_databases, swallow_an_error
from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only, greenlet_spawn
from test_cancellation import run_and_cancel

from asgi_dbsession import (
    ConcurrentUse,
    DBSessionMiddleware,
    SessionClosed,
    TransactionAborted,
    on_commit,
    set_rollback,
)

pytestmark = pytest.mark.anyio

KINDS = (
    "asyncpg + asyncmy + sqlite",
    "psycopg-sync + pymysql-sync + sqlite-sync",
    "sqlite-sync + asyncpg + pymysql-sync",
    "asyncmy + sqlite + psycopg-sync",
)


@pytest.fixture(params=KINDS)
async def several(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Several]:
    """Three databases of three kinds, async and sync mixed."""
    async with several_databases(request.param, tmp_path) as databases:
        yield databases


async def test_all_are_flushed_and_then_committed_in_order(several: Several) -> None:
    """All databases commit before the response is sent, in declared order."""
    done: list[Any] = []
    for number, running in enumerate(several.each):
        event.listen(engine_of(running), "commit", lambda _, n=number: done.append(("commit", n)))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("written")
        await several.add("added")
        for number, running in enumerate(several.each):
            event.listen(
                orm(running), "after_flush", lambda *_, n=number: done.append(("flush", n))
            )
        on_commit(lambda: done.append(("followed up", several.stored())))
        await respond(send)

    def look(message: Message) -> None:
        done.append((message["type"], several.stored()))

    await get(DBSessionMiddleware(app, *several.databases), on_message=look)
    stored = [["written", "added"]] * 3
    assert done == [
        *(("flush", number) for number in range(3)),
        *(("commit", number) for number in range(3)),
        ("followed up", stored),
        ("http.response.start", stored),
        ("http.response.body", stored),
    ]


@pytest.mark.parametrize("when", ["handler", "background"])
@pytest.mark.parametrize("number", range(3))
async def test_a_flush_that_fails_fails_before_anything_is_stored(
    several: Several, number: int, when: str
) -> None:
    """Any of the databases may fail, in any part of the request."""
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if when == "background":
            await respond(send)
        await several.write("lost")
        await several.add("added")
        await in_session(several.each[number], lambda session: session.add(Entry("lost")))
        on_commit(lambda: done.append("called"))
        if when == "handler":
            await respond(send)

    exchange = await get(DBSessionMiddleware(app, *several.databases))
    assert isinstance(exchange.error, IntegrityError)
    assert exchange.complete == (when == "background")
    assert (several.stored(), done) == ([[], [], []], [])


@pytest.mark.parametrize("end", ["status", "set_rollback", "exception"])
async def test_all_are_rolled_back_together(several: Several, end: str) -> None:
    """All databases are rolled back, for each kind of decision."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("lost")
        await several.add("added")
        set_rollback(True) if end == "set_rollback" else None
        if end == "exception":
            raise LookupError
        await respond(send, 404 if end == "status" else 200)

    await get(DBSessionMiddleware(app, *several.databases))
    assert several.stored() == [[], [], []]


async def test_a_rollback_that_is_stopped_stops_no_other_and_is_not_hidden(
    several: Several,
) -> None:
    """A listener may raise what is no `Exception`, as a time limit in a signal handler does."""

    class Stop(BaseException):
        """Raised by a listener."""

    def stop(*_: object) -> None:
        raise Stop

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("lost")
        event.listen(orm(several.each[0]), "after_rollback", stop, once=True)
        await respond(send, 404)

    with pytest.raises(Stop):
        await get(DBSessionMiddleware(app, *several.databases))
    assert several.stored() == [[], [], []]


async def test_a_listener_of_before_commit_has_its_say_before_anything_is_stored(
    several: Several,
) -> None:
    """The listener is called once, may add rows to store, and may refuse."""
    called = []

    def note(session: Session, *, path: str) -> None:
        called.append(session)
        session.add(Entry("by listener"))
        if path == "/refused" and len(called) == 3:
            raise LookupError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("kept")
        for running in several.each:
            event.listen(orm(running), "before_commit", partial(note, path=scope["path"]))
        await respond(send)

    middleware = DBSessionMiddleware(app, *several.databases)
    refused = await get(middleware, "/refused")
    assert isinstance(refused.error, LookupError)
    assert several.stored() == [[], [], []]
    called.clear()
    assert (await get(middleware)).status == 200
    assert several.stored() == [["kept", "by listener"]] * 3
    assert len(called) == 3


async def test_an_error_that_a_listener_swallows_comes_before_anything_is_stored(
    several: Several,
) -> None:
    """PostgreSQL can store nothing any more, so no database may commit."""
    (aborted,) = (each for each in several.each if each.real.is_postgresql)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.add("lost")
        event.listen(orm(aborted), "after_flush", swallow_an_error, once=True)
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, *several.databases))
    assert isinstance(exchange.error, TransactionAborted)
    assert (exchange.messages, several.stored()) == ([], [[], [], []])


@pytest.mark.parametrize("kinds", ["asyncpg + sqlite", "psycopg-sync + sqlite-sync"])
async def test_a_listener_that_comes_too_late_for_another_session_is_told(
    tmp_path: Path, kinds: str
) -> None:
    """Flushed sessions cannot flush again; the error comes before anything is stored."""
    async with several_databases(kinds, tmp_path) as several:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await several.write("lost")
            early, late = map(orm, several.each)
            insert = ENTRY.insert().values(note="too late")
            event.listen(late, "before_commit", lambda _: early.execute(insert))
            await respond(send)

        exchange = await get(DBSessionMiddleware(app, *several.databases))
        assert isinstance(exchange.error, InvalidRequestError)
        assert several.stored() == [[], []]


@pytest.mark.parametrize("when", ["before_commit", "before_flush", "after_flush"])
@pytest.mark.parametrize("earlier", ["it has read", "it is not open"])
@pytest.mark.parametrize("statement", [select(ENTRY), ENTRY.insert().values(note="by listener")])
@pytest.mark.parametrize(
    "kinds", ["sqlite + asyncpg", "asyncpg + psycopg-sync", "psycopg-sync + sqlite-sync"]
)
async def test_what_a_listener_does_in_another_session_ends_before_the_response(
    tmp_path: Path, kinds: str, statement: Any, earlier: str, when: str
) -> None:
    """The other session has nothing to commit until the flush of this session uses it."""
    found: list[Any] = []
    async with several_databases(kinds, tmp_path) as several:
        writer, reader = several.each

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if earlier == "it has read":
                await reader.execute(select(ENTRY))
            await in_session(writer, lambda session: session.add(Entry("written")))
            listener = lambda *_: orm(reader).execute(statement)  # noqa: E731
            event.listen(orm(writer), when, listener, once=True)
            await respond(send)

        def look(_: Message) -> None:
            found.append((several.stored(), checked_out(reader.database)))

        exchange = await get(DBSessionMiddleware(app, *several.databases), on_message=look)
    assert exchange.error is None
    by_listener = ["by listener"] if statement.is_insert else []
    assert found == [([["written"], by_listener], 0)] * 2


@pytest.mark.parametrize("edge", ["a message", "a wait", "the end of a body"])
@pytest.mark.parametrize("earlier", ["it has read", "it is not open", "another task has read"])
@pytest.mark.parametrize(
    "listener", ["before_commit: insert", "after_flush: insert", "after_flush: add"]
)
@pytest.mark.parametrize(
    "kinds", ["sqlite + asyncpg", "asyncpg + psycopg-sync", "psycopg-sync + sqlite-sync"]
)
async def test_what_a_listener_does_in_another_session_is_stored_before_the_same_message(
    tmp_path: Path, kinds: str, earlier: str, listener: str, edge: str
) -> None:
    """Otherwise the client could read that all is stored. The listener never waits forever."""
    found: list[Any] = []
    async with several_databases(kinds, tmp_path) as several:
        writer, other = several.each

        def look(*_: object) -> None:
            found.append((several.stored(), checked_out(other.database)))

        def use(how: str, *_: object) -> None:
            if how == "add":
                orm(other).add(Entry("by listener"))
            else:
                orm(other).execute(ENTRY.insert().values(note="by listener"))

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "websocket":
                assert (await receive())["type"] == "websocket.connect"
                await send({"type": "websocket.accept"})
            else:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            if earlier == "it has read":
                await other.execute(select(ENTRY))
            elif earlier == "another task has read":
                await asyncio.create_task(other.execute(select(ENTRY)))
            await in_session(writer, lambda session: session.add(Entry("written")))
            when, _, how = listener.partition(": ")
            event.listen(orm(writer), when, partial(use, how), once=True)
            found.clear()
            if edge == "a message":
                await send({"type": "websocket.send", "text": "stored"})
            elif edge == "a wait":
                await receive()
                look()
            else:
                await send({"type": "http.response.body", "body": b"stored"})

        peer: Any = Exchange if edge == "the end of a body" else Socket
        exchange = peer(DBSessionMiddleware(app, *several.databases), on_message=look)
        if edge == "a wait":
            exchange.hang_up()
        await exchange.run()
    assert exchange.error is None
    assert found == [([["written"], ["by listener"]], 0)]


async def test_a_failed_task_undoes_its_work_on_one_database_only(tmp_path: Path) -> None:
    """The work of the successful task on the other database is stored."""
    async with several_databases("sqlite + asyncpg", tmp_path) as several:
        first, second = several.each

        async def fail() -> None:
            await first.write("by the failed task")
            raise ValueError

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await respond(send)
            await second.write("in the background")
            with suppress(ValueError):
                await asyncio.create_task(fail())

        assert (await get(DBSessionMiddleware(app, *several.databases))).error is None
        assert several.stored() == [[], ["in the background"]]


@pytest.mark.parametrize("edge", ["a message", "the end of a body"])
@pytest.mark.parametrize("kinds", ["sqlite + asyncpg", "asyncpg + psycopg-sync"])
async def test_a_listener_of_the_rollback_of_a_failed_task_uses_another_session(
    tmp_path: Path, kinds: str, edge: str
) -> None:
    """The listener never waits forever, and its work is stored before the same message."""
    found: list[Any] = []
    async with several_databases(kinds, tmp_path) as several:
        first, second = several.each

        def use(*_: object) -> None:
            orm(second).execute(ENTRY.insert().values(note="by listener"))

        async def fail() -> None:
            await first.write("by the failed task")
            raise ValueError

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "websocket":
                assert (await receive())["type"] == "websocket.connect"
                await send({"type": "websocket.accept"})
            else:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.gather(asyncio.create_task(fail()), return_exceptions=True)
            await second.write("written")
            event.listen(orm(first), "after_rollback", use, once=True)
            if edge == "a message":
                await send({"type": "websocket.send", "text": "stored"})
            else:
                await send({"type": "http.response.body", "body": b"stored"})
            found.append(several.stored())

        peer: Any = Exchange if edge == "the end of a body" else Socket
        exchange = await peer(DBSessionMiddleware(app, *several.databases)).run()
    assert exchange.error is None
    assert found == [[[], ["written", "by listener"]]]


async def test_a_savepoint_that_nobody_closed_is_stored_with_the_rest(several: Several) -> None:
    """The functions run as with one database."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("before")
        for running in several.each:
            await in_session(running, lambda session: session.begin_nested())
        await several.add("inside")
        await respond(send)

    assert (await get(DBSessionMiddleware(app, *several.databases))).error is None
    assert several.stored() == [["before", "inside"]] * 3


async def test_a_commit_that_fails_leaves_what_was_committed_before_it(tmp_path: Path) -> None:
    """Without two-phase commit, earlier databases stay committed; later ones are rolled back."""
    done: list[str] = []
    async with several_databases("asyncmy + sqlite + psycopg-sync", tmp_path) as several:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            on_commit(lambda: done.append("given before any work"))
            await several.write("half")
            await several.each[1].doom()
            on_commit(lambda: done.append("called"))
            await respond(send)

        exchange = await get(DBSessionMiddleware(app, *several.databases))
        assert isinstance(exchange.error, IntegrityError)
        assert (exchange.messages, done) == ([], [])
        assert several.stored() == [["half"], [], []]


async def test_a_function_waits_for_all_that_was_done_before_it(several: Several) -> None:
    """If the handler commits one database itself, the function still waits for the others."""
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write(scope["path"])
        on_commit(lambda: done.append(scope["path"]))
        await several.each[0].call("commit")
        await respond(send, 400 if scope["path"] == "/undone" else 200)

    middleware = DBSessionMiddleware(app, *several.databases)
    for path in ("/undone", "/stored"):
        await get(middleware, path)
    assert done == ["/stored"]
    assert several.stored() == [["/undone", "/stored"], ["/stored"], ["/stored"]]


async def test_a_rollback_of_later_work_on_another_database_drops_no_function(
    several: Several,
) -> None:
    """The order is stored, so its mail is sent, although the handler gave up something else."""
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        first, second, _ = several.each
        await first.write("kept")
        on_commit(lambda: done.append("sent"))
        await second.write("given up")
        await second.call("rollback")
        await respond(send)

    await get(DBSessionMiddleware(app, *several.databases))
    assert (done, several.stored()) == (["sent"], [["kept"], [], []])


@pytest.mark.parametrize(
    "kinds",
    ["asyncpg + asyncmy", "sqlite + asyncpg", "psycopg-sync + asyncmy", "pymysql-sync + sqlite"],
)
async def test_no_operation_comes_between_flush_and_commit(tmp_path: Path, kinds: str) -> None:
    """A function of another task waits until the end, and belongs to later work."""
    between, go = asyncio.Event(), asyncio.Event()
    stored: list[Any] = []
    tasks = []
    async with several_databases(kinds, tmp_path) as several:
        early, late = several.each

        def wait(*_: Any) -> None:
            between.set()
            await_only(go.wait())

        async def other() -> None:
            await between.wait()
            writing = asyncio.create_task(early.write("late"))
            done, _ = await asyncio.wait([writing], timeout=0.1)
            stored.append(done)
            go.set()
            await writing

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await several.add("kept")
            event.listen(orm(late), "before_flush", wait, once=True)
            tasks.append(asyncio.create_task(other()))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await tasks[0]
            await send({"type": "http.response.body"})

        def look(message: Message) -> None:
            stored.append(several.stored())

        exchange = await get(DBSessionMiddleware(app, *several.databases), on_message=look)
        assert exchange.error is None
        assert stored[:2] == [set(), [["kept"], ["kept"]]]
        assert several.stored() == [["kept", "late"], ["kept"]]


@pytest.mark.parametrize("way", ["native", "native twice", "anyio"])
@pytest.mark.parametrize("kinds", ["asyncpg + pymysql-sync", "psycopg-sync + asyncmy"])
async def test_cancelled_at_any_await_it_is_all_or_nothing(
    tmp_path: Path, kinds: str, way: str
) -> None:
    """A request is cancelled at each await: it is stored in both databases or in none."""
    async with several_databases(kinds, tmp_path) as several:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await several.add(scope["path"])
            await respond(send)

        middleware = DBSessionMiddleware(app, *several.databases)
        at, reached = 0, True
        while reached:
            at += 1
            exchange = Exchange(middleware, f"/{at}")
            reached, _ = await run_and_cancel(several.each[0], exchange, at, way)
            await several.assert_clean()
            first, second = several.stored()
            assert first == second
            assert f"/{at}" in first or exchange.status is None
        assert f"/{at}" in first
        assert at > 6


def test_an_end_cancelled_with_its_loop_rolls_all_of_them_back(tmp_path: Path) -> None:
    """A server that stops during a flush leaves no transaction open."""
    waiting, first = real_database("asyncpg", tmp_path), real_database("sqlite-sync", tmp_path)
    third = real_database("pymysql-sync", tmp_path)
    reals = (first, waiting, third)
    databases = [real.describe() for real in reals]
    requests: list[asyncio.Task[Exchange]] = []

    async def serve() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            for each in map(Running, reals, databases):
                await in_session(each, lambda session: session.add(Entry("lost")))
            await respond(send)

        for database in databases:
            await database.startup()
        requests.append(asyncio.create_task(get(DBSessionMiddleware(app, *databases))))
        await becomes_true(lambda: is_blocked(waiting))

    with waiting.reader.connect() as connection:
        connection.execute(text("LOCK TABLE entry"))
        asyncio.run(serve())  # cancels the remaining tasks, and waits for them
        assert requests[0].done()
    assert [real.stored() for real in reals] == [[], [], []]
    for database in (databases[0], databases[2]):
        asyncio.run(database.shutdown())
    asyncio.run(becomes_true(lambda: not any(real.open_transactions() for real in reals)))
    for real in reals:
        real.reader.dispose()


def is_blocked(real: Real) -> bool:
    """Return True if a session waits for a lock."""
    with real.reader.connect() as connection:
        return bool(connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")))


@pytest.mark.parametrize("kinds", ["asyncpg + sqlite", "sqlite + asyncpg"])
async def test_a_race_lost_at_commit_runs_again_unless_another_was_committed(
    tmp_path: Path, kinds: str
) -> None:
    """Work that one database has stored must not be repeated, so the conflict is an error."""
    runs = []
    async with several_databases(kinds, tmp_path) as several:
        (sqlite,) = (each for each in several.each if each.real.is_sqlite)
        reader = sqlite.real.reader.connect()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            runs.append(scope)
            if len(runs) == 2:
                reader.close()
            await sqlite.execute(text("PRAGMA busy_timeout = 0"))
            await several.write("once")
            await respond(send)

        with reader:
            reader.exec_driver_sql("BEGIN")
            # COMMIT has to wait for this transaction.
            reader.exec_driver_sql("SELECT * FROM entry").all()
            middleware = DBSessionMiddleware(app, *several.databases, attempts=3)
            exchange = await get(middleware)
        if several.each[0] is sqlite:
            assert (len(runs), exchange.status) == (2, 200)
            assert several.stored() == [["once"], ["once"]]
        else:
            assert len(runs) == 1
            assert isinstance(exchange.error, OperationalError)
            assert several.stored() == [["once"], []]


@pytest.mark.parametrize("moment", ["response", "return"])
async def test_a_thread_may_open_a_session_in_the_middle_of_an_end(
    tmp_path: Path, moment: str
) -> None:
    """The COMMIT of the open sessions continues, and the new session does not stay open."""
    opening, ending = threading.Event(), threading.Event()
    opened: list[Future[Session]] = []

    class First(Session):
        def in_transaction(self) -> bool:
            if opening.is_set() and not ending.is_set():
                ending.set()
                opened[0].exception(10)
            return super().in_transaction()

    class Late(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if self.bind is not None:  # the first pass only measures
                opening.set()
                assert ending.wait(10)

    (tmp_path / "late").mkdir()
    real = real_database("sqlite-sync", tmp_path)
    first: Any = real.describe(session_options={"class_": First})
    late: Any = real_database("sqlite-sync", tmp_path / "late").describe(
        session_options={"class_": Late}
    )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if moment == "return":
            await respond(send)
        first.get_session().add(Entry("kept"))
        opened.append(threads.submit(copy_context().run, late.get_session))
        opening.wait(10)
        if moment == "response":
            await respond(send)

    with ThreadPoolExecutor(1) as threads:
        async with first, late:
            exchange = await get(DBSessionMiddleware(app, first, late))
    assert (exchange.status, exchange.error) == (200, None)
    assert real.stored() == ["kept"]
    if moment == "return":
        assert isinstance(opened[0].exception(), SessionClosed)
    else:
        with pytest.raises(SessionClosed):
            opened[0].result().connection()


@pytest.mark.parametrize(
    ("several", "two_phase"),
    [
        ("asyncpg + sqlite", False),
        ("psycopg-sync + sqlite-sync", False),
        ("asyncpg + asyncmy", True),
    ],
    indirect=["several"],
)
async def test_what_a_flush_adds_to_a_database_that_is_flushed_already_is_stored_later(
    several: Several, *, two_phase: bool
) -> None:
    """An audit log in another database, for example, is no part of this COMMIT."""
    first, last = several.each

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.add("row")
        audited = orm(first)
        audit = lambda *_: audited.add(Entry("audit"))  # noqa: E731
        event.listen(orm(last), "after_flush", audit, once=True)
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=two_phase))
    assert (exchange.status, exchange.error) == (200, None)
    assert several.stored() == [["row", "audit"], ["row"]]


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "several", ["sqlite + psycopg-sync", "asyncpg + sqlite-sync"], indirect=True
)
async def test_a_blocking_statement_does_not_wait_for_the_commit_of_an_async_database(
    several: Several,
) -> None:
    """The event loop would stand still for ever: only it can go on with that COMMIT."""
    first, second = several.each
    errors: list[BaseException | None] = []
    committing = asyncio.Event()
    event.listen(engine_of(first), "commit", lambda _: committing.set())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = orm(second)

        async def block() -> None:
            await committing.wait()
            session.execute(text("SELECT 1"))

        task = asyncio.create_task(block())
        await several.write("row")
        await respond(send)
        await asyncio.wait([task])
        errors.append(task.exception())

    exchange = await get(DBSessionMiddleware(app, *several.databases))
    assert (exchange.status, exchange.error) == (200, None)
    assert several.stored() == [["row"], ["row"]]
    assert [type(each) for each in errors] == [ConcurrentUse]


async def test_one_that_was_not_used_is_left_alone(several: Several) -> None:
    """A database without a connection sends no COMMIT."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.each[1].execute(ENTRY.insert().values(note="kept"))
        for each in several.databases:
            each.get_session()
        await respond(send)

    for running in (several.each[0], several.each[2]):
        event.listen(engine_of(running), "checkout", lambda *_: pytest.fail("it was used"))
    await get(DBSessionMiddleware(app, *several.databases))
    assert several.stored() == [[], ["kept"], []]


async def test_the_page_shows_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is in both databases; the other blocks of the page work too."""
    monkeypatch.chdir(tmp_path)
    page = Page("docs/how-to/several-databases.md")
    shop = page.run(0)
    async with shop["shop"] as database, shop["reports"] as reports:
        for table, each in (("sold", database.engine.sync_engine), ("sale", reports.engine)):
            await greenlet_spawn(create_table, each, table)
        exchange = await get(shop["app"], method="POST")
        assert (exchange.status, exchange.error) == (201, None)
        with create_engine("sqlite:///shop.db", poolclass=NullPool).connect() as connection:
            assert connection.scalars(text("SELECT * FROM sold")).all() == ["cup"]
        with create_engine("sqlite:///reports.db", poolclass=NullPool).connect() as connection:
            assert connection.scalars(text("SELECT * FROM sale")).all() == ["cup"]
    names = {**shop}
    exec(compile(page.blocks()[1], page.path, "exec"), names)
    assert names["app"].user_middleware


def create_table(engine: Engine, name: str) -> None:
    """Make a table with one column."""
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE {name} (item TEXT)"))
