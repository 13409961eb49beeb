"""Each finished unit of work is reported once: its result, its reason and its cost."""

import asyncio
import gc
import inspect
import logging
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread
from asgi import Message, Socket, get, respond
from conftest import ENTRY, Running, becomes_true, checked_out, real_database
from sqlalchemy import select
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DBSessionMiddleware,
    SyncDatabase,
    UnitReport,
    on_commit,
    set_rollback,
)
from asgi_dbsession.testing import rolled_back

pytestmark = pytest.mark.anyio

KINDS = ("sqlite", "asyncpg", "psycopg-sync")


def outcomes(reports: list[UnitReport]) -> list[tuple[str, str | None]]:
    """The results of units and the reasons."""
    return [(each.outcome, each.reason) for each in reports]


async def silence(scope: Any, receive: Any, send: Any) -> None:
    """Do nothing."""


@asynccontextmanager
async def begun(database: AsyncDatabase[Any] | SyncDatabase[Any]) -> AsyncIterator[Any]:
    """Open a new unit for each kind of database; its session is used in this thread."""
    if isinstance(database, SyncDatabase):
        with database.begin() as session:
            yield session.execute
    else:
        async with database.begin() as session:
            yield session.execute


@pytest.mark.parametrize(
    ("how", "outcome", "reason", "error"),
    [
        ("success", "committed", None, None),
        ("status", "rolled_back", "status", None),
        ("set_rollback", "rolled_back", "set_rollback", None),
        ("exception", "rolled_back", "exception", LookupError),
        ("silence", "rolled_back", "unfinished", None),
        ("doomed", "rolled_back", "commit_failed", Exception),
        ("unused", "nothing_to_do", None, None),
        ("own commit", "committed", None, None),
        ("own commit, then an exception", "committed", "exception", LookupError),
    ],
)
async def test_each_end_is_reported_with_its_reason(
    running: Running, how: str, outcome: str, reason: str | None, error: type[Exception] | None
) -> None:
    """There is one report, for each end of a request."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if how == "unused":
            running.database.get_session()
        else:
            await running.write("row")
        if how == "set_rollback":
            set_rollback(True)
        elif how == "silence":
            return
        elif how == "doomed":
            await running.doom()
        elif how.startswith("own commit"):
            await running.call("commit")
        if how.endswith("exception"):
            raise LookupError
        await respond(send, 404 if how == "status" else 200)

    app_with_reports = DBSessionMiddleware(app, running.database, on_report=reports.append)
    exchange = await get(app_with_reports)
    assert outcomes(reports) == [(outcome, reason)]
    (report,) = reports
    assert isinstance(report.error, error or type(None))
    assert report.scope["path"] == exchange.scope["path"]
    assert [each.database for each in report.databases] == [running.database]
    assert report.databases[0].committed == (outcome == "committed")
    assert running.stored() == (["row"] if outcome == "committed" else [])


@pytest.mark.parametrize("real", ["sqlite", "asyncpg"], indirect=True)
async def test_the_rollback_of_a_failed_task_is_reported(running: Running) -> None:
    """The application returns without an error, so its last report says nothing of the task."""
    reports: list[UnitReport] = []

    async def fail() -> None:
        await running.write("half done")
        raise LookupError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        await asyncio.wait([asyncio.create_task(fail())])

    await get(DBSessionMiddleware(app, running.database, on_report=reports.append))
    assert ("rolled_back", "exception") in outcomes(reports)
    assert running.stored() == []


@pytest.mark.parametrize("fails", [False, True])
async def test_what_an_on_commit_function_does_is_a_unit_of_its_own(
    running: Running, caplog: pytest.LogCaptureFixture, *, fails: bool
) -> None:
    """The unit of the function ends first, so it is reported first."""
    reports: list[UnitReport] = []

    async def follow_up() -> None:
        await running.write("mail")
        if fails:
            raise LookupError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("order")
        on_commit(follow_up)
        await respond(send)

    with caplog.at_level(logging.CRITICAL):
        await get(DBSessionMiddleware(app, running.database, on_report=reports.append))
    ends = [("rolled_back", "exception") if fails else ("committed", None), ("committed", None)]
    assert outcomes(reports) == ends
    assert isinstance(reports[0].error, LookupError if fails else type(None))
    assert [each.databases[0].statements for each in reports] == [1, 1]
    assert running.stored() == (["order"] if fails else ["order", "mail"])


async def test_a_request_that_asks_for_no_session_is_not_reported(running: Running) -> None:
    """No unit of work was used, so there is no report."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)

    await get(DBSessionMiddleware(app, running.database, on_report=reports.append))
    assert reports == []


async def test_cancellation_is_reported(running: Running) -> None:
    """It is reported as cancelled, not as an exception."""
    reports: list[UnitReport] = []
    is_waiting = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("row")
        is_waiting.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(
        get(DBSessionMiddleware(app, running.database, on_report=reports.append))
    )
    await is_waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert outcomes(reports) == [("rolled_back", "cancelled")]
    assert isinstance(reports[0].error, asyncio.CancelledError)


async def test_what_follows_the_response_is_reported_on_its_own(running: Running) -> None:
    """The unit of the response comes before the start message, the task's after its end."""
    told: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("before")
        await respond(send)
        await running.write("after")
        await running.write("more")

    def note(report: UnitReport) -> None:
        told.append((report.outcome, report.databases[0].statements))

    def look(message: Message) -> None:
        told.append(message["type"])

    await get(DBSessionMiddleware(app, running.database, on_report=note), on_message=look)
    assert told == [
        ("committed", 1),
        "http.response.start",
        "http.response.body",
        ("committed", 2),
    ]


async def test_the_time_that_it_takes_is_told_apart(running: Running) -> None:
    """The report has the waiting time, the holding time, and the working time."""
    reports: list[UnitReport] = []
    asked: list[float] = []

    class Noting(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            asked.append(time.perf_counter())
            return super().get_bind(*args, **kwargs)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY), database)
        await running.execute(select(ENTRY), database)
        await respond(send)

    name = "class_" if running.real.is_sync else "sync_session_class"
    options = {"pool_size": 1, "max_overflow": 0, "session_options": {name: Noting}}
    async with running.real.describe(**options) as database:
        served = DBSessionMiddleware(app, database, on_report=reports.append)
        async with begun(database) as execute:
            result = execute(select(ENTRY))
            if not isinstance(database, SyncDatabase):
                await result
            asked.clear()
            begin = time.time()
            request = asyncio.create_task(get(served))
            await becomes_true(lambda: bool(asked))
            await asyncio.sleep(0.05)
            assert not reports
        await request
        latest = time.perf_counter()
    (report,) = reports
    (used,) = report.databases
    assert used.statements == 2
    assert 0.025 < used.wait_time < latest - asked[0]
    assert 0 < used.operation_duration < used.use_time
    assert used.wait_time + used.use_time < report.duration
    assert begin <= report.start_time <= time.time()


async def test_waiting_in_vain_counts(running: Running) -> None:
    """A failed wait for a connection is the most important information."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY), database)

    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    async with running.real.describe(**options) as database:
        served = DBSessionMiddleware(app, database, on_report=reports.append)
        async with begun(database) as execute:
            result = execute(select(ENTRY))
            if not isinstance(database, SyncDatabase):
                await result
            await get(served)
    assert outcomes(reports) == [("rolled_back", "exception")]
    assert isinstance(reports[0].error, PoolTimeout)
    assert (reports[0].databases[0].statements, reports[0].databases[0].use_time) == (0, 0)
    assert 0.05 <= reports[0].databases[0].wait_time <= reports[0].duration


@pytest.mark.parametrize("real", ["sqlite", "asyncpg"], indirect=True)
async def test_a_wait_that_is_cancelled_counts(running: Running) -> None:
    """The client disconnects while the request waits for a connection."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY), database)

    async with running.real.describe(pool_size=1, max_overflow=0) as database:
        served = DBSessionMiddleware(app, database, on_report=reports.append)
        async with begun(database) as execute:
            await execute(select(ENTRY))
            task = asyncio.create_task(get(served))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    assert outcomes(reports) == [("rolled_back", "cancelled")]
    assert 0.05 < reports[0].databases[0].wait_time <= reports[0].duration


async def test_a_session_that_is_only_asked_for_its_engine_does_not_wait(running: Running) -> None:
    """The application may call `get_bind` itself, long before its first statement."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        running.database.get_session().get_bind()
        await asyncio.sleep(0.1)
        await running.execute(select(ENTRY))
        running.database.get_session().get_bind()
        await asyncio.sleep(0.1)
        await respond(send)

    await get(DBSessionMiddleware(app, running.database, on_report=reports.append))
    assert reports[0].databases[0].wait_time < 0.1


def here(offset: int = 0) -> str:
    """Return the line that calls this function, as `file:line`."""
    frame = inspect.stack()[1]
    return f"{frame.filename}:{frame.lineno + offset}"


@pytest.mark.parametrize("ends", ["by another statement", "by the response"])
async def test_the_longest_idle_stretch_is_placed_in_the_code(running: Running, ends: str) -> None:
    """The report names the application's lines before and after, through all SQLAlchemy frames."""
    reports: list[UnitReport] = []
    places: list[str] = []

    def in_thread(session: Any) -> None:
        session.execute(select(ENTRY))
        places.append(here(-1))
        time.sleep(0.2)
        if ends == "by another statement":
            session.execute(select(ENTRY))
            places.append(here(-1))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()
        if isinstance(running.database, SyncDatabase):
            await to_thread.run_sync(in_thread, session)
        else:
            await session.execute(select(ENTRY))
            places.append(here(-1))
            await asyncio.sleep(0.2)
            if ends == "by another statement":
                await session.execute(select(ENTRY))
                places.append(here(-1))
        await respond(send)

    await get(DBSessionMiddleware(app, running.database, on_report=reports.append))
    (used,) = reports[0].databases
    assert 0.2 <= used.idle_time <= used.use_time
    assert [used.idle_after, used.idle_before] == [*places, None][:2]


async def test_a_callback_that_raises_breaks_nothing(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged."""

    def fail(report: UnitReport) -> None:
        raise LookupError("no such metric")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        await respond(send, 201)

    with caplog.at_level(logging.ERROR, "asgi_dbsession"):
        exchange = await get(DBSessionMiddleware(app, running.database, on_report=fail))
    assert (exchange.status, exchange.error, running.stored()) == (201, None, ["kept"])
    assert "no such metric" in caplog.text


async def test_a_unit_inside_of_a_request_is_reported_on_its_own(running: Running) -> None:
    """It has the request's scope and its own work; the error around it is not its error."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            int("wrong password")
        except ValueError:
            async with begun(running.database) as execute:
                result = execute(ENTRY.insert().values(note="audit"))
                if not isinstance(running.database, SyncDatabase):
                    await result
            async with begun(running.database) as execute:
                set_rollback(True)
                result = execute(ENTRY.insert().values(note="undone"))
                if not isinstance(running.database, SyncDatabase):
                    await result
        await running.execute(select(ENTRY))
        await respond(send, 401)

    await get(DBSessionMiddleware(app, running.database, on_report=reports.append))
    assert outcomes(reports) == [
        ("committed", None),
        ("rolled_back", "set_rollback"),
        ("rolled_back", "status"),
    ]
    assert [each.databases[0].statements for each in reports] == [1, 1, 1]
    assert {each.scope["path"] for each in reports} == {"/"}
    assert running.stored() == ["audit"]


async def test_a_failing_unit_inside_of_a_request_is_reported(running: Running) -> None:
    """The report has the error of the unit, although the request itself succeeds."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(LookupError):
            async with begun(running.database) as execute:
                result = execute(select(ENTRY))
                if not isinstance(running.database, SyncDatabase):
                    await result
                raise LookupError
        await respond(send)

    await get(DBSessionMiddleware(app, running.database, on_report=reports.append))
    assert outcomes(reports) == [("rolled_back", "exception")]
    assert isinstance(reports[0].error, LookupError)


async def test_a_socket_is_reported_at_each_end(running: Running) -> None:
    """A report comes before each send and each wait; a refused work has the reason `status`."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await running.write("one")
        await send({"type": "websocket.accept"})
        await running.write("two")
        await send({"type": "websocket.close", "code": 1011})

    socket = Socket(DBSessionMiddleware(app, running.database, on_report=reports.append))
    await socket.run()
    assert socket.error is None
    assert outcomes(reports) == [("committed", None), ("rolled_back", "status")]


async def test_a_commit_that_fails_after_another_shows_in_the_report(tmp_path: Path) -> None:
    """If only a part was stored, the report says which part."""
    reports: list[UnitReport] = []
    first = real_database("sqlite", tmp_path)
    second = real_database("asyncpg", tmp_path)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Running(first, databases[0]).write("stored")
        await Running(second, databases[1]).write("lost")
        await Running(second, databases[1]).doom()
        await respond(send)

    async with first.describe() as one, second.describe() as two:
        databases = (one, two)
        await get(DBSessionMiddleware(app, one, two, on_report=reports.append))
    assert outcomes(reports) == [("rolled_back", "commit_failed")]
    assert [each.committed for each in reports[0].databases] == [True, False]
    assert (first.stored(), second.stored()) == (["stored"], [])


async def test_nothing_listens_unless_a_report_is_wanted(running: Running) -> None:
    """No listener is added to an engine or a session, so there is no cost without reports."""
    plain = running.database
    async with running.real.describe() as measured:
        for database, count in ((plain, 0), (measured, 1)):
            engine: Any = database.engine
            if count:
                DBSessionMiddleware(silence, database, on_report=print)
                DBSessionMiddleware(silence, database, on_report=print)
            else:
                DBSessionMiddleware(silence, database)
            assert ("do_commit" in vars(engine.dialect)) == bool(count)
            assert not getattr(engine, "sync_engine", engine).dispatch.before_cursor_execute
            assert not engine.pool.dispatch.checkout


async def test_one_of_two_middlewares_that_share_a_database_may_report(running: Running) -> None:
    """Each middleware reports its own requests, also with `from_engine` and running databases."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY), shared)
        await respond(send)

    database_class: Any = type(running.database)
    shared: AsyncDatabase[Any] = database_class.from_engine(running.database.engine)
    silent = DBSessionMiddleware(app, shared)
    telling = DBSessionMiddleware(app, shared, on_report=reports.append)
    await get(silent, "/silent")
    await get(telling, "/telling")
    await get(silent, "/silent")
    assert [each.scope["path"] for each in reports] == ["/telling"]
    assert reports[0].databases[0].statements == 1


async def test_requests_at_once_are_told_apart(running: Running) -> None:
    """Each report has its own statements, although the requests share few connections."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(int(scope["path"][1:])):
            await running.execute(select(ENTRY), database)
            await asyncio.sleep(0)
        await respond(send)

    async with running.real.describe(pool_size=2, max_overflow=0) as database:
        served = DBSessionMiddleware(app, database, on_report=reports.append)
        await asyncio.gather(*(get(served, f"/{number}") for number in range(1, 7)))
        assert checked_out(database) == 0
    found = {each.scope["path"]: each.databases[0].statements for each in reports}
    assert found == {f"/{number}": number for number in range(1, 7)}


async def test_tests_that_are_rolled_back_have_reports_too(running: Running) -> None:
    """A test has the same reports as production."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write(scope["path"])
        await respond(send)

    served = DBSessionMiddleware(app, running.database, on_report=reports.append)
    async with rolled_back(running.database):
        await get(served, "/one")
        await get(served, "/two")
    assert outcomes(reports) == [("committed", None)] * 2
    assert [each.databases[0].committed for each in reports] == [True, True]
    assert min(each.databases[0].statements for each in reports) >= 1


def test_a_coroutine_function_is_refused() -> None:
    """Nobody would await the coroutine."""

    async def note(report: UnitReport) -> None: ...

    with pytest.raises(ConfigurationError, match="on_report takes a plain function"):
        DBSessionMiddleware(silence, "sqlite://", on_report=note)


async def test_what_goes_to_another_engine_is_no_waiting(running: Running) -> None:
    """A session may use another engine for SELECTs, which is not measured."""
    reports: list[UnitReport] = []
    replica: Any = running.real.describe()
    options: dict[str, Any] = {}

    class Routing(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(replica.engine, "sync_engine", replica.engine)

    options["class_" if running.real.is_sync else "sync_session_class"] = Routing

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY), database)
        await respond(send)

    async with replica, running.real.describe(session_options=options) as database:
        await get(DBSessionMiddleware(app, database, on_report=reports.append))
    (used,) = reports[0].databases
    assert (used.statements, used.wait_time, used.use_time) == (0, 0, 0)


async def test_a_session_is_freed_without_the_garbage_collector(running: Running) -> None:
    """The memory is the same as without reports, so later requests are not slower."""
    sessions: list[weakref.ref[Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        opened: Any = running.database.get_session()
        sessions.append(weakref.ref(getattr(opened, "sync_session", opened)))
        await respond(send)

    gc.collect()
    gc.disable()
    try:
        for on_report in (None, lambda report: None):
            await get(DBSessionMiddleware(app, running.database, on_report=on_report))
        if not running.real.is_sqlite:
            await get(DBSessionMiddleware(app, running.database, two_phase=True))
        # A worker thread may still hold objects.
        await becomes_true(lambda: {each() for each in sessions} == {None})
    finally:
        gc.enable()


async def test_an_engine_that_is_built_later_is_measured_too(running: Running) -> None:
    """The observer gets the engine at startup, and a new engine after a shutdown."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY), database)
        await respond(send)

    database = running.real.describe()
    served = DBSessionMiddleware(app, database, on_report=reports.append)
    for _ in range(2):
        async with database:
            await get(served)
    assert [each.databases[0].statements for each in reports] == [1, 1]
