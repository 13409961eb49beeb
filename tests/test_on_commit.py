"""Functions given to `on_commit` run after COMMIT, and before the response is sent."""

import asyncio
import gc
import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from asgi import Message, Socket, get, respond
from conftest import ENTRY, Running, checked_out, real_database
from pages import Page
from several import Entry, in_session
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DBSessionMiddleware,
    NoSession,
    SessionClosed,
    SyncDatabase,
    get_session,
    get_sync_session,
    on_commit,
    set_rollback,
)
from asgi_dbsession.unit.optional.after_commit.callback import AfterCommit

pytestmark = pytest.mark.anyio


async def test_functions_run_in_order_after_commit_and_before_the_response(
    running: Running,
) -> None:
    """The row is stored and the connection is in the pool; async functions are awaited."""
    done: list[Any] = []

    def plain() -> None:
        done.append(("plain", running.stored(), checked_out(running.database)))

    async def awaited() -> None:
        await asyncio.sleep(0)
        done.append("awaited")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        on_commit(plain)
        on_commit(awaited)
        on_commit(lambda: done.append("last"))
        await respond(send, 201)

    def look(message: Message) -> None:
        done.append(message["type"])

    await get(DBSessionMiddleware(app, running.database), on_message=look)
    assert done == [
        ("plain", ["kept"], 0),
        "awaited",
        "last",
        "http.response.start",
        "http.response.body",
    ]


@pytest.mark.parametrize("where", ["handler", "body", "background"])
async def test_they_need_no_session(where: str, tmp_path: Path) -> None:
    """Without work, the function runs at the end of the unit."""
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        messages = {
            "handler": {"type": "http.response.start", "status": 200, "headers": []},
            "body": {"type": "http.response.body", "body": b""},
        }
        for place, message in messages.items():
            if place == where:
                on_commit(lambda: done.append("called"))
            await send(message)
            done.append(place)
        if where == "background":
            on_commit(lambda: done.append("called"))

    await get(DBSessionMiddleware(app, f"sqlite:///{tmp_path}/unused.db"))
    expected = ["handler", "body"]
    expected.insert([*expected, "background"].index(where), "called")
    assert done == expected


@pytest.mark.parametrize(
    "how",
    ["status", "set_rollback", "exception", "failed commit", "handler", "invalidate", "close"],
)
async def test_a_rollback_drops_them(running: Running, how: str) -> None:
    """For each kind of rollback, no mail about discarded work is sent."""
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("undone")
        on_commit(lambda: done.append("sent"))
        if how == "set_rollback":
            set_rollback(True)
        elif how == "exception":
            raise LookupError
        elif how == "failed commit":
            await running.doom()
        elif how == "handler":
            await running.call("rollback")
        elif how == "invalidate":
            await running.call("invalidate")
        elif how == "close":
            await in_session(running, lambda session: session.get_transaction().close())
        await respond(send, 404 if how == "status" else 200)

    await get(DBSessionMiddleware(app, running.database))
    assert (done, running.stored()) == ([], [])


async def test_what_was_discarded_is_not_stored_by_what_follows(running: Running) -> None:
    """A transaction that ends without COMMIT drops the functions given in it, and no others."""
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("undone")
        on_commit(lambda: done.append("undone"))
        await in_session(running, lambda session: session.get_transaction().close())
        await running.write("kept")
        on_commit(lambda: done.append("kept"))
        await respond(send)

    await get(DBSessionMiddleware(app, running.database))
    assert (done, running.stored()) == (["kept"], ["kept"])


async def test_a_rollback_drops_what_was_given_before_the_session_was_opened(
    running: Running,
) -> None:
    """All work is rolled back, so all functions are dropped."""
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        on_commit(lambda: done.append("sent"))
        await running.write("undone")
        await running.call("rollback")
        await respond(send)

    await get(DBSessionMiddleware(app, running.database))
    assert done == []


@pytest.mark.parametrize("path", ["/", "/background"])
async def test_what_a_listener_gives_during_the_last_flush_is_called_with_the_rest(
    running: Running, path: str
) -> None:
    """A search index, for example, gets all flushed rows, and no failed rows."""
    done: list[Any] = []

    def give(*_: Any) -> None:
        on_commit(lambda: done.append(running.stored()))

    def listen_and_add(session: Any) -> None:
        event.listen(session, "after_flush", give)
        session.add(Entry("kept"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if path == "/background":
            await respond(send)
        await in_session(running, listen_and_add)
        if path == "/":
            await respond(send)

    def look(message: Message) -> None:
        done.append(message["type"])

    middleware = DBSessionMiddleware(app, running.database)
    await get(middleware, path, on_message=look)
    response = ["http.response.start", "http.response.body"]
    assert done == ([*response, ["kept"]] if path == "/background" else [["kept"], *response])
    done.clear()
    assert (await get(middleware, path)).error is not None  # the note exists already
    assert done == []


@pytest.mark.parametrize(("rolls_back", "expected"), [(True, ["outer"]), (False, ["outer", "in"])])
async def test_a_savepoint_drops_what_was_given_inside_of_it(
    running: Running, rolls_back: bool, expected: list[str]
) -> None:
    """Only functions of this savepoint are dropped, and none of earlier or released savepoints."""
    done: list[str] = []

    def in_savepoint() -> None:
        opened: Any = running.database.get_session()
        session: Any = getattr(opened, "sync_session", opened)
        session.execute(ENTRY.insert().values(note="outer"))
        on_commit(lambda: done.append("outer"))
        with session.begin_nested():
            session.execute(ENTRY.insert().values(note="in"))
        savepoint = session.begin_nested()
        on_commit(lambda: done.append("in"))
        savepoint.rollback() if rolls_back else savepoint.commit()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if isinstance(running.database, SyncDatabase):
            await to_thread.run_sync(in_savepoint)
        else:
            await running.database.get_session().run_sync(lambda _: in_savepoint())
        await respond(send)

    await get(DBSessionMiddleware(app, running.database))
    assert done == expected


@pytest.mark.parametrize("catches", ["inside", "outside"])
async def test_a_failed_flush_drops_what_was_given_in_its_savepoint(
    running: Running, catches: str
) -> None:
    """SQLAlchemy rolls back to the savepoint, and reports only the rollback of the flush."""
    done: list[str] = []
    with running.real.reader.begin() as connection:
        connection.execute(ENTRY.insert().values(note="taken"))

    def in_savepoint(session: Session) -> None:
        on_commit(lambda: done.append("outer"))
        session.execute(ENTRY.insert().values(note="kept"))
        with suppress(IntegrityError), session.begin_nested():
            session.add(Entry("taken"))
            on_commit(lambda: done.append("in"))
            with suppress(IntegrityError if catches == "inside" else LookupError):
                session.flush()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await in_session(running, in_savepoint)
        await respond(send)

    await get(DBSessionMiddleware(app, running.database))
    assert (done, running.stored()) == (["outer"], ["taken", "kept"])


async def test_what_the_handler_committed_by_itself_is_followed_up(running: Running) -> None:
    """The row is stored, so its function runs, although the rest of the request fails."""
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        on_commit(lambda: done.append("kept"))
        await running.call("commit")
        await running.write("undone")
        on_commit(lambda: done.append("undone"))
        await respond(send, 400)

    await get(DBSessionMiddleware(app, running.database))
    assert (done, running.stored()) == (["kept"], ["kept"])


async def test_a_failing_function_is_logged_and_nothing_else(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The work stays stored, the other functions run, and the client gets its response."""
    done: list[str] = []

    def fail() -> None:
        raise LookupError("no mail server")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        on_commit(fail)
        on_commit(lambda: done.append("next"))
        await respond(send, 201)

    with caplog.at_level(logging.ERROR, "asgi_dbsession"):
        exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error, done) == (201, None, ["next"])
    assert running.stored() == ["kept"]
    assert "the committed work stays stored" in caplog.text
    assert "no mail server" in caplog.text


async def test_one_that_waits_for_what_was_cancelled_has_failed_like_any_other(
    running: Running,
) -> None:
    """The function's own task is cancelled, not the request."""
    done: list[str] = []

    async def wait() -> None:
        task = asyncio.create_task(asyncio.sleep(60))
        task.cancel()
        await task

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        on_commit(wait)
        on_commit(lambda: done.append("next"))
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error, done) == (201, None, ["next"])


async def test_each_is_a_unit_of_work_of_its_own(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Work in its session is stored before the response, or rolled back if it fails."""
    seen: list[Any] = []

    async def audit() -> None:
        await running.write("audit")

    async def fail() -> None:
        await running.write("undone")
        raise LookupError

    async def clash() -> None:
        await running.doom()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        for function in (audit, fail, clash, audit):
            on_commit(function)
        await respond(send)

    def look(message: Message) -> None:
        seen.append((running.stored(), checked_out(running.database)))

    exchange = await get(DBSessionMiddleware(app, running.database), on_message=look)
    assert exchange.error is None
    # The second audit row violates a unique constraint.
    assert seen == [(["kept", "audit"], 0)] * 2
    assert caplog.text.count("the committed work stays stored") == 3


@pytest.mark.parametrize("path", ["/", "/background"])
async def test_functions_may_give_further_functions(running: Running, path: str) -> None:
    """They are called after the function that gave them, also at the end of a request."""
    done: list[str] = []

    def first() -> None:
        on_commit(lambda: done.append("further"))
        done.append("first")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if path == "/background":
            await respond(send)
        await running.write("kept")
        on_commit(first)
        on_commit(lambda: done.append("last"))
        if path == "/":
            await respond(send)

    await get(DBSessionMiddleware(app, running.database), path)
    assert done == ["first", "further", "last"]


def alive() -> int:
    """Return how many functions wait, or were called but not freed."""
    return sum(isinstance(each, AfterCommit) for each in gc.get_objects())


async def test_a_long_socket_keeps_no_function_that_was_called(running: Running) -> None:
    """Otherwise the memory of a WebSocket would grow with each message."""
    found: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        for number in range(3):
            await running.write(f"work {number}")
            on_commit(lambda: None)
            await send({"type": "websocket.send", "text": "stored"})
            found.append(alive() - before)

    gc.collect()
    before = alive()  # objects of other tests
    await Socket(DBSessionMiddleware(app, running.database)).run()
    assert found == [0, 0, 0]


async def test_they_keep_nothing_alive(running: Running) -> None:
    """The functions of a request are freed with it, without the garbage collector."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for status in (200, 400):
            await running.write(f"{scope['path']} {status}")
            on_commit(lambda: None)
            await running.call("commit" if status == 200 else "rollback")
            on_commit(lambda: None)
        await respond(send)

    middleware = DBSessionMiddleware(app, running.database)
    gc.collect()
    gc.disable()
    before = alive()  # objects of other tests
    try:
        for number in range(3):
            await get(middleware, f"/{number}")
        assert alive() == before
    finally:
        gc.enable()


def test_on_trio_they_are_called_where_they_were_given(tmp_path: Path) -> None:
    """A plain function of an `async def` handler is called on the event loop too."""
    threads: list[Any] = []
    real = real_database("sqlite-sync", tmp_path)

    async def main() -> None:
        async with real.describe() as database:

            async def app(scope: Any, receive: Any, send: Any) -> None:
                on_commit(lambda: threads.append(threading.current_thread()))
                await to_thread.run_sync(
                    lambda: on_commit(lambda: threads.append(threading.current_thread()))
                )
                await respond(send)

            async def ignore(*_: Any) -> None:
                """No unit of work is open here."""

            scope = {"type": "http", "method": "GET", "path": "/"}
            await DBSessionMiddleware(app, database)(scope, ignore, ignore)

    anyio.run(main, backend="trio")
    assert [each is threading.main_thread() for each in threads] == [True, False]
    real.reader.dispose()


async def test_a_race_that_one_loses_does_not_run_the_request_again(tmp_path: Path) -> None:
    """Functions before it were called."""
    real = real_database("sqlite", tmp_path)
    done: list[str] = []
    async with real.describe() as database:

        async def lose() -> None:
            assert isinstance(database, AsyncDatabase)
            async with database.begin() as session:
                await session.execute(text("PRAGMA busy_timeout = 0"))
                await session.execute(ENTRY.insert().values(note="undone"))

        async def app(scope: Any, receive: Any, send: Any) -> None:
            on_commit(lambda: done.append("sent"))
            on_commit(lose)
            await respond(send)

        with real.reader.connect() as connection:
            connection.exec_driver_sql("BEGIN EXCLUSIVE")
            exchange = await get(DBSessionMiddleware(app, database, attempts=3))
        assert (exchange.status, done, real.stored()) == (200, ["sent"], [])
    real.reader.dispose()


async def test_bodies_and_background_tasks_have_their_own(running: Running) -> None:
    """The function runs if the background task's work was stored, and otherwise not at all."""
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await running.write("body")
        on_commit(lambda: done.append("body"))
        await send({"type": "http.response.body", "body": b""})
        await running.write("background")
        on_commit(lambda: done.append("background"))
        if scope["path"] == "/fails":
            raise LookupError

    served = DBSessionMiddleware(app, running.database)
    await get(served)
    assert done == ["body", "background"]


async def test_messages_of_a_socket_wait_for_them(running: Running) -> None:
    """Each message calls the functions of its own work."""
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        for word in ("one", "two"):
            await running.write(word)
            on_commit(lambda word=word: done.append(word))
            await send({"type": "websocket.send", "text": word})

    def look(message: Message) -> None:
        done.append(message["type"])

    await Socket(DBSessionMiddleware(app, running.database), on_message=look).run()
    assert done == ["websocket.accept", "one", "websocket.send", "two", "websocket.send"]


def test_the_result_of_a_call_is_refused() -> None:
    """The error says how to write what was meant."""

    async def send_mail() -> None:
        """Return a coroutine, which is no function."""

    given: Any = send_mail()
    with pytest.raises(ConfigurationError, match=r"type coroutine.*`on_commit\(lambda: "):
        on_commit(given)
    given.close()


async def test_begin_has_them_too(running: Running) -> None:
    """`begin()` of scripts and workers calls the functions too."""
    done: list[str] = []

    def blocking() -> None:
        assert isinstance(running.database, SyncDatabase)
        with running.database.begin() as session:
            session.execute(ENTRY.insert().values(note="kept"))
            on_commit(lambda: done.append("kept"))
        with pytest.raises(LookupError), running.database.begin():
            on_commit(lambda: done.append("undone"))
            raise LookupError
        with running.database.begin(), pytest.raises(ConfigurationError, match="plain function"):
            on_commit(asyncio.Event().wait)

    if running.real.is_sync:
        await to_thread.run_sync(blocking)
    else:
        assert isinstance(running.database, AsyncDatabase)
        async with running.database.begin() as session:
            await session.execute(ENTRY.insert().values(note="kept"))
            on_commit(lambda: done.append("kept"))
        with pytest.raises(LookupError):
            async with running.database.begin():
                on_commit(lambda: done.append("undone"))
                raise LookupError
    assert (done, running.stored()) == (["kept"], ["kept"])


async def test_a_mounted_middleware_waits_for_the_outer_commit(running: Running) -> None:
    """A function given in an inner middleware runs after the COMMIT of the outer one."""
    done: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        on_commit(lambda: done.append(running.stored()))
        await respond(send)

    inner = DBSessionMiddleware(app, running.database)
    await get(DBSessionMiddleware(inner, running.database))
    assert done == [["kept"]]


@pytest.mark.parametrize("given", ["above", "below"])
async def test_a_rollback_of_a_mounted_middleware_drops_what_was_given_before_its_session(
    running: Running, given: str
) -> None:
    """A session that the inner middleware opens later belongs to the same request."""
    other = running.real.describe()
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if given == "below":
            on_commit(lambda: done.append("sent"))
        await running.write("undone")
        await respond(send)

    inner = DBSessionMiddleware(app, running.database, commit_when=lambda _: False)

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        if given == "above":
            on_commit(lambda: done.append("sent"))
        await inner(scope, receive, send)

    async with other:
        exchange = await get(DBSessionMiddleware(outer, other))
    assert (exchange.status, exchange.error) == (200, None)
    assert (done, running.stored()) == ([], [])


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_function_of_a_blocking_unit_the_session_around_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, fails: bool
) -> None:
    """After an inner `begin()`, `get_session()` returns the outer session again, or raises."""
    real = real_database("sqlite-sync", tmp_path)
    database = real.describe()
    assert isinstance(database, SyncDatabase)
    seen: list[object] = []

    def look() -> None:
        seen.append(database.get_session())
        if fails:
            raise LookupError

    async def main() -> None:
        async with database:
            with database.begin() as outer:
                with database.begin() as inner:
                    on_commit(look)
                assert database.get_session() is outer
                assert len({id(each) for each in (*seen, inner, outer)}) == 3
            with pytest.raises(NoSession):
                database.get_session()

    asyncio.run(main())
    caplog.clear()


async def test_a_function_given_below_finds_the_sessions_that_are_there(running: Running) -> None:
    """The function has a session of a database that only the inner middleware has."""
    other = running.real.describe()
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")

        def look() -> None:
            mine = get_sync_session() if running.real.is_sync else get_session()
            found.append(mine is running.database.get_session())
            found.append(other.get_session() is mine)

        on_commit(look)
        await respond(send)

    async with other:
        inner = DBSessionMiddleware(app, running.database)
        exchange = await get(DBSessionMiddleware(inner, other))
    assert (exchange.status, found) == (200, [True, False])


def test_begin_says_of_a_function_that_it_cannot_await_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A lambda that returns a coroutine shows this only when called; it is logged."""
    real = real_database("sqlite-sync", tmp_path)
    database = real.describe()
    assert isinstance(database, SyncDatabase)

    async def mail() -> None:
        """Return a coroutine that nobody awaits."""

    def work() -> None:
        with database.begin() as session:
            session.execute(ENTRY.insert().values(note="kept"))
            on_commit(lambda: mail())

    async def main() -> None:
        async with database:
            await to_thread.run_sync(work)

    asyncio.run(main())
    assert "takes a plain function" in caplog.text
    assert real.stored() == ["kept"]
    caplog.clear()


async def test_it_needs_a_unit_of_work(running: Running) -> None:
    """Outside of a unit of work, and after its end, `on_commit` raises an error."""
    with pytest.raises(NoSession):
        on_commit(lambda: None)
    late: list[asyncio.Task[None]] = []

    async def outlives() -> None:
        await over.wait()
        with pytest.raises(SessionClosed):
            on_commit(lambda: None)

    over = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        late.append(asyncio.create_task(outlives()))
        await respond(send)

    await get(DBSessionMiddleware(app, running.database))
    over.set()
    await asyncio.gather(*late)


async def test_a_task_that_a_listener_made_is_told_that_it_comes_too_late(tmp_path: Path) -> None:
    """A task that a listener starts inherits its context, in which `on_commit` still works."""
    tasks: list[asyncio.Task[None]] = []
    over = asyncio.Event()

    async def outlives() -> None:
        await over.wait()
        on_commit(lambda: None)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        def start(_: Any) -> None:
            tasks.append(asyncio.create_task(outlives()))

        session = database.get_session()
        event.listen(session.sync_session, "after_commit", start)
        session.add(Entry("kept"))
        await respond(send)

    async with AsyncDatabase(real_database("sqlite", tmp_path).url) as database:
        await get(DBSessionMiddleware(app, database))
        over.set()
        with pytest.raises(SessionClosed):
            await tasks[0]


async def test_a_cancelled_request_still_follows_up_what_it_stored(tmp_path: Path) -> None:
    """After COMMIT, the functions run to completion."""
    real = real_database("asyncpg", tmp_path)
    done: list[str] = []
    async with real.describe() as database:

        async def slow() -> None:
            request.cancel()
            await asyncio.sleep(0.01)
            done.append("slow")

        async def app(scope: Any, receive: Any, send: Any) -> None:
            assert isinstance(database, AsyncDatabase)
            await database.get_session().execute(text("SELECT 1"))
            on_commit(slow)
            on_commit(lambda: done.append("next"))
            await respond(send)

        request = asyncio.create_task(get(DBSessionMiddleware(app, database)))
        with pytest.raises(asyncio.CancelledError):
            await request
        assert done == ["slow", "next"]
    real.reader.dispose()


@pytest.mark.parametrize("is_sold", [True, False])
async def test_the_page_shows_what_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_sold: bool
) -> None:
    """The mail is sent and recorded if the cup was sold."""
    monkeypatch.chdir(tmp_path)
    page = Page("docs/how-to/on-commit.md").run(0)
    async with page["shop"] as database:
        async with database.begin() as session:
            await session.execute(text("CREATE TABLE mail (subject TEXT)"))
            unique = "" if is_sold else "CHECK (item <> 'cup') "
            await session.execute(text(f"CREATE TABLE sold (item TEXT {unique})"))
        await get(page["app"], method="POST")
        async with database.begin() as session:
            recorded = (await session.scalars(text("SELECT subject FROM mail"))).all()
    assert page["outbox"] == recorded == (["You have bought a cup."] if is_sold else [])
