"""Tests what real applications did, and what this package must do with it."""

import asyncio
import logging
from typing import Any

import pytest
from asgi import Socket, get, respond
from conftest import ENTRY, Running
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from asgi_dbsession import (
    AsyncDatabase,
    ConcurrentUse,
    ConfigurationError,
    DBSessionMiddleware,
    NoSession,
    PrematureClose,
    SyncDatabase,
    UnitReport,
    on_commit,
    set_rollback,
    warn_when_idle,
)

pytestmark = pytest.mark.anyio
KINDS = ("sqlite", "sqlite-sync", "asyncpg", "psycopg-sync")

DONE = {"type": "http.response.body", "body": b"done"}
START = {"type": "http.response.start", "status": 200, "headers": []}


async def accept(receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})


async def say(send: Any, words: str) -> None:
    await send({"type": "websocket.send", "text": words})


# Several tasks with one session


async def test_a_body_waits_for_the_commit_of_a_child_task(running: Running) -> None:
    """The last message of the body means success, so it is not sent if COMMIT fails."""
    if running.real.is_sync:
        pytest.skip("a thread does not tell which task started it")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        async with asyncio.TaskGroup() as group:
            group.create_task(running.doom())
        await send(DONE)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.complete, running.stored()) == (False, [])
    assert exchange.error is not None
    await running.assert_clean()


async def test_work_of_a_failed_task_is_not_committed_by_the_next_message(running: Running) -> None:
    """This holds for a WebSocket message and for the end of a body."""
    if running.real.is_sync:
        pytest.skip("a thread does not tell which task started it")

    async def fail() -> None:
        await running.write("half")
        raise LookupError

    async def socket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await asyncio.wait([task := asyncio.create_task(fail())])
        assert task.exception()
        await say(send, "next")

    async def body(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await asyncio.wait([task := asyncio.create_task(fail())])
        assert task.exception()
        await send(DONE)

    heard = await Socket(DBSessionMiddleware(socket, running.database)).run()
    exchange = await get(DBSessionMiddleware(body, running.database))
    assert (heard.heard, heard.error, exchange.complete) == (["next"], None, True)
    assert running.stored() == []
    await running.assert_clean()


@pytest.mark.parametrize("slow", ["the good one", "the bad one"])
async def test_two_tasks_on_one_session_of_a_socket_are_told_no_untruth(
    running: Running, slow: str
) -> None:
    """One transaction cannot be committed for one task and rolled back for the other."""
    if running.real.is_sync:
        pytest.skip("a thread does not tell which task started it")
    first, second = asyncio.Event(), asyncio.Event()
    errors: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)

        async def good() -> None:
            await running.write("good")
            first.set()
            await second.wait()
            await asyncio.sleep(0.05 if slow == "the good one" else 0)
            await say(send, "good is stored")

        async def bad() -> None:
            await first.wait()
            await running.write("bad")
            second.set()
            await asyncio.sleep(0.05 if slow == "the bad one" else 0)
            set_rollback(True)
            await say(send, "bad has failed")

        errors.extend(await asyncio.gather(good(), bad(), return_exceptions=True))

    socket = await Socket(DBSessionMiddleware(app, running.database)).run()
    assert (socket.heard, running.stored()) == ([], [])
    assert ConcurrentUse in [type(each) for each in errors]
    assert isinstance(socket.error, ConcurrentUse)
    await running.assert_clean()


async def test_a_heartbeat_sends_and_commits_nothing(running: Running) -> None:
    """A task without work may send, and its message commits no work of other tasks."""
    if running.real.is_sync:
        pytest.skip("a thread does not tell which task started it")
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)

        async def beat() -> None:
            await say(send, "beat")
            seen.append(running.stored())

        await running.write("whole")
        await asyncio.create_task(asyncio.sleep(0))
        task = asyncio.create_task(beat())
        while not task.done():
            await asyncio.sleep(0)
        await say(send, "stored")

    socket = await Socket(DBSessionMiddleware(app, running.database)).run()
    assert (socket.heard, seen, running.stored()) == (["beat", "stored"], [[]], ["whole"])


@pytest.mark.parametrize("how", ["a time limit", "a task"])
async def test_a_send_in_another_task_commits_the_work_of_the_task_that_waits(
    running: Running, how: str
) -> None:
    """Before Python 3.12, `asyncio.wait_for` sends in a task too. The other task only waits."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await running.write("stored")
        saying = say(send, "stored")
        await (
            asyncio.wait_for(saying, 5) if how == "a time limit" else asyncio.create_task(saying)
        )
        seen.append(running.stored())

    await Socket(DBSessionMiddleware(app, running.database)).run()
    assert seen == [["stored"]]


# Rules, start messages and errors


async def test_a_second_start_acknowledges_nothing(running: Running) -> None:
    """The server refuses the second start message."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await running.write("never")
        await send(START)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert isinstance(exchange.error, AssertionError)
    assert running.stored() == []


@pytest.mark.parametrize("decision", ["coroutine", None, "no", 0, 1])
async def test_a_rule_that_does_not_decide_rolls_back(running: Running, decision: Any) -> None:
    """Any value except True and False is an error, and nothing is sent."""

    async def awaited() -> bool:
        return False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("never")
        await respond(send)

    def rule(status: int) -> Any:
        return awaited() if decision == "coroutine" else decision

    exchange = await get(DBSessionMiddleware(app, running.database, commit_when=rule))
    assert isinstance(exchange.error, ConfigurationError)
    assert (exchange.messages, running.stored()) == ([], [])
    with pytest.raises(ConfigurationError, match="True or False"):
        set_rollback("no")  # type: ignore[arg-type]


async def test_an_error_while_a_request_is_stopped_is_kept(running: Running) -> None:
    """The exception becomes a note on the error of the COMMIT, which stays the same."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.doom()
        try:
            await respond(send)
        finally:
            raise KeyError("clean-up")

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert not isinstance(exchange.error, KeyError)
    assert any("clean-up" in each for each in getattr(exchange.error, "__notes__", ()))


# Sessions that the application closes


@pytest.mark.parametrize("real", ["sqlite", "asyncpg"], indirect=True)
@pytest.mark.parametrize("catches", [True, False])
@pytest.mark.parametrize("how", ["async with", "close in except"])
async def test_a_session_that_is_closed_because_of_an_error_hides_no_error(
    running: Running, how: str, *, catches: bool
) -> None:
    """The application gets its own error, and the work is rolled back even if it catches it.

    After `close()`, the request fails if it answers with a success. `async with` and `rollback()`
    say that the work may be lost.
    """

    async def work() -> None:
        session: Any = running.database.get_session()
        if how == "async with":
            async with session:
                await running.write("gone")
                raise LookupError
        try:
            await running.write("gone")
            raise LookupError
        except LookupError:
            await session.close()
            raise

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await work()
        except LookupError:
            if not catches:
                raise
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert isinstance(exchange.error, LookupError) is not catches
    if catches and how == "close in except":
        assert (exchange.status, type(exchange.error)) == (None, PrematureClose)
    else:
        assert exchange.status == (200 if catches else None)
    assert running.stored() == []
    await running.assert_clean()


async def test_closing_without_an_error_is_refused_still(running: Running) -> None:
    """The work would be lost, but a success would be sent."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("gone")
        await running.call("close")
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert isinstance(exchange.error, PrematureClose)


async def test_closing_twice_is_no_error(running: Running) -> None:
    """The tests of an application close the session of a request that has ended."""
    sessions: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sessions.append(running.database.get_session())
        await running.execute(select(ENTRY))
        await respond(send)

    await get(DBSessionMiddleware(app, running.database))
    for session in (*sessions, *sessions):
        done = session.close()
        if asyncio.iscoroutine(done):
            await done


# Code that outlives a request, and code below SQLAlchemy


@pytest.mark.parametrize("real", ["sqlite", "asyncpg"], indirect=True)
@pytest.mark.parametrize("uses_session", [True, False])
async def test_a_worker_that_a_request_has_started_has_no_part_in_the_request(
    running: Running, *, uses_session: bool
) -> None:
    """`session.info["scope"]` is None, so later jobs get no data of a tenant."""
    seen: list[Any] = []
    tasks: list[asyncio.Task[None]] = []
    jobs: asyncio.Queue[None] = asyncio.Queue()
    database: Any = running.database

    async def work() -> None:
        while True:
            await jobs.get()
            async with database.begin() as session:
                seen.append(session.info["scope"])
            jobs.task_done()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if uses_session:
            await running.execute(select(ENTRY))
        if not tasks:
            tasks.append(asyncio.create_task(work()))
        await respond(send)

    middleware = DBSessionMiddleware(app, database)
    for _ in range(2):
        await get(middleware)
        jobs.put_nowait(None)
        await jobs.join()
    tasks[0].cancel()
    assert seen == [None, None]


async def test_a_request_of_the_same_connection_does_not_find_the_session_before_it(
    running: Running,
) -> None:
    """Uvicorn starts a waiting request in the context of the previous request's last message."""
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        running.database.get_session()
        await respond(send)

    def look(message: Any) -> None:
        if message["type"] == "http.response.body":
            with pytest.raises(NoSession):
                running.database.get_session()
            found.append(True)

    await get(DBSessionMiddleware(app, running.database), on_message=look)
    assert found == [True]


# Arguments of the package


@pytest.mark.parametrize("given", ["called", "a coroutine", None])
async def test_on_commit_refuses_what_cannot_be_called(running: Running, given: Any) -> None:
    """The error comes at once, and names the forgotten lambda."""

    async def send_mail() -> None:
        """No unit of work is open here."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        mail: Any = send_mail() if given == "a coroutine" else given
        try:
            with pytest.raises(ConfigurationError, match="lambda"):
                on_commit(mail)
        finally:
            if given == "a coroutine":
                mail.close()
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.status == 200


class Keywords(Session):
    """Routing session classes of public projects work like this."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)


class AsyncKeywords(AsyncSession):
    """The same session class, for sync sessions."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)


def test_session_classes_with_keywords_only_work() -> None:
    """The class is given as `class_` and as `sync_session_class`."""
    SyncDatabase("sqlite://", session_options={"class_": Keywords})
    AsyncDatabase("sqlite://", session_options={"class_": AsyncKeywords})
    AsyncDatabase("sqlite://", session_options={"sync_session_class": Keywords})


async def test_a_report_counts_only_what_its_session_asked_for(running: Running) -> None:
    """The session works too if the application asks it for its engine."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()
        session.get_bind()
        engine: Any = running.database.engine
        if running.real.is_sync:
            with engine.connect() as connection:
                connection.execute(select(ENTRY))
        else:
            async with engine.connect() as connection:
                await connection.execute(select(ENTRY))
        await running.execute(select(ENTRY))
        await respond(send)

    await get(DBSessionMiddleware(app, running.database, on_report=reports.append))
    assert [each.statements for report in reports for each in report.databases] == [1]


async def test_a_report_that_is_printed_shows_no_header(running: Running) -> None:
    """A log of reports must not contain tokens of clients."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["headers"].append((b"authorization", b"Bearer s3cr3t"))
        await running.execute(select(ENTRY))
        await respond(send)

    await get(DBSessionMiddleware(app, running.database, on_report=reports.append))
    assert reports
    assert "s3cr3t" not in repr(reports)


async def test_a_client_writes_no_line_of_its_own_into_the_log(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Line breaks and escape sequences of a path are escaped."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        await asyncio.sleep(0.02)
        await respond(send)

    middleware = DBSessionMiddleware(app, running.database, on_report=warn_when_idle(0.01))
    with caplog.at_level(logging.WARNING, "asgi_dbsession"):
        await get(middleware, "/x\nCRITICAL all is lost\x1b[31m")
    assert caplog.messages
    assert not any("\n" in each or "\x1b" in each for each in caplog.messages)


async def test_an_error_that_is_its_own_cause_does_not_stop_the_worker(running: Running) -> None:
    """`raise error from error` makes a circle of causes."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            raise LookupError
        except LookupError as error:
            raise error from error

    middleware = DBSessionMiddleware(app, running.database, retry_after=1)
    exchange = await asyncio.wait_for(get(middleware), 5)
    assert isinstance(exchange.error, LookupError)


@pytest.mark.parametrize("real", ["asyncpg", "psycopg-sync"], indirect=True)
async def test_a_body_that_was_kept_is_released_with_the_answer(running: Running) -> None:
    """After the start of a response, no copy of the request body is needed."""
    kept: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert len(message["body"]) == 1000
        await send(START)
        replay = receive.__closure__[-1].cell_contents  # the object that keeps the body
        kept.append(len(replay._body))
        await send(DONE)

    middleware = DBSessionMiddleware(app, running.database, attempts=3)
    exchange = await get(middleware, content=b"x" * 1000)
    assert (exchange.error, kept) == (None, [0])


@pytest.mark.parametrize("real", ["asyncpg", "psycopg"], indirect=True)
async def test_copy_as_the_first_thing_is_rolled_back(running: Running) -> None:
    """`session.connection()` begins the transaction."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()
        connection = await session.connection()
        raw: Any = (await connection.get_raw_connection()).driver_connection
        await raw.execute("INSERT INTO entry (note) VALUES ('raw')")
        await respond(send, 409)

    await get(DBSessionMiddleware(app, running.database))
    assert running.stored() == []
