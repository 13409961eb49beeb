"""Tests the promises on trio, where a `SyncDatabase` works as on asyncio."""

from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import anyio
import pytest
from anyio import from_thread, to_thread
from asgi import respond
from conftest import ENTRY, Real, checked_out
from sqlalchemy import select, text
from trio.abc import Instrument
from trio.lowlevel import Task, add_instrument, current_task, remove_instrument

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DBSessionMiddleware,
    SyncDatabase,
    get_sync_session,
    set_rollback,
)
from asgi_dbsession.session.completion import run_to_completion

pytestmark = pytest.mark.anyio

KINDS = ("sqlite-sync", "psycopg-sync")  # works without asyncio

STARTUP = {"type": "lifespan.startup"}
COMPLETE = {"type": "lifespan.startup.complete"}
SHUTDOWN = {"type": "lifespan.shutdown"}
STOPPED = {"type": "lifespan.shutdown.complete"}


@pytest.fixture
def anyio_backend() -> str:
    """Run the tests of this file on trio."""
    return "trio"


@pytest.fixture
async def database(real: Real) -> AsyncIterator[SyncDatabase]:
    """A running database of each kind, checked after the test."""
    description: Any = real.describe()
    async with description as running:
        yield running
        assert_clean(real, running)


def assert_clean(real: Real, database: SyncDatabase) -> None:
    """Check that no connection is checked out and no transaction is open on the server."""
    assert checked_out(database) == 0
    assert real.open_transactions() == 0


async def write(note: str) -> None:
    """Store a row as a `def` handler does."""
    insert = ENTRY.insert().values(note=note)
    await to_thread.run_sync(lambda: get_sync_session().execute(insert))


async def serve(
    app: Any, kind: str = "http", *, on_message: Callable[[Any], None] = lambda _: None
) -> list[Any]:
    """Serve one scope with an application, and return the sent messages."""
    sent: list[Any] = []
    asked = iter([STARTUP, SHUTDOWN])

    async def receive() -> Any:
        await anyio.lowlevel.checkpoint()
        return next(asked)

    async def send(message: Any) -> None:
        await anyio.lowlevel.checkpoint()
        on_message(message)
        sent.append(message)

    await app({"type": kind, "asgi": {"version": "3.0"}}, receive, send)
    return sent


class Steps(Instrument):
    """Counts the steps of the current task, and acts before a chosen step.

    Args:
        at: The number of the step.
        act: What to do.
    """

    def __init__(self, at: int, act: Callable[[], object]) -> None:
        self.count = 0
        self._at = at
        self._act = act

    def __enter__(self) -> Self:
        self._task = current_task()
        add_instrument(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        remove_instrument(self)

    def after_task_step(self, task: Task) -> None:
        """Called by trio before each step."""
        if task is self._task:
            self.count += 1
            if self.count == self._at:
                self._act()


@pytest.mark.parametrize("status", [200, 400])
async def test_a_request_is_stored_before_its_client_hears_of_it(
    real: Real, database: SyncDatabase, status: int
) -> None:
    """The work is committed or rolled back, as the status says."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await write("one")
        await respond(send, status)

    expected = ["one"] if status == 200 else []

    def look(_message: Any) -> None:
        assert real.stored() == expected
        assert_clean(real, database)

    middleware = DBSessionMiddleware(app, database)
    assert (await serve(middleware, on_message=look))[0]["status"] == status


async def test_a_request_cancelled_at_any_step_leaves_nothing_behind(
    real: Real, database: SyncDatabase
) -> None:
    """The work of the handler is stored completely or not at all, and so is that of the body."""
    told: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await write(f"{at} handler 1")
        await write(f"{at} handler 2")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await write(f"{at} body 1")
        await write(f"{at} body 2")
        await send({"type": "http.response.body", "body": b"end"})

    middleware = DBSessionMiddleware(app, database)
    at, reached = 0, True
    while reached:
        at += 1
        told.clear()
        with anyio.CancelScope() as scope, Steps(at, scope.cancel) as steps:
            await serve(middleware, on_message=told.append)
        reached = steps.count >= at
        assert_clean(real, database)
        stored = [note.split()[1:] for note in real.stored() if note.startswith(f"{at} ")]
        assert [number for _, number in stored] == ["1", "2"] * (len(stored) // 2), stored
        if told:
            assert ["handler", "1"] in stored
    assert at > 8
    assert len(stored) == 4


async def test_the_work_of_other_tasks_is_not_cut_in_two(
    real: Real, database: SyncDatabase
) -> None:
    """The work of a child at the end of the body is committed or rolled back completely."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with anyio.create_task_group() as children:
            children.start_soon(store_half)
            await half_stored.wait()
            await send({"type": "http.response.body", "body": b"end"})
            answered.set()

    async def store_half() -> None:
        get_sync_session().execute(ENTRY.insert().values(note="half"))
        half_stored.set()
        await answered.wait()
        set_rollback(True)

    half_stored, answered = anyio.Event(), anyio.Event()
    await serve(DBSessionMiddleware(app, database))
    assert real.stored() == []


async def test_the_work_of_a_task_that_has_ended_is_stored_with_the_body(
    real: Real, database: SyncDatabase
) -> None:
    """The sender has waited for the child, so its message also speaks for the child."""
    stored: list[list[str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with anyio.create_task_group() as children:
            children.start_soon(store)
        await send({"type": "http.response.body", "body": b"end"})

    async def store() -> None:
        get_sync_session().execute(ENTRY.insert().values(note="of the child"))

    await serve(
        DBSessionMiddleware(app, database), on_message=lambda _: stored.append(real.stored())
    )
    assert stored == [[], ["of the child"]]


async def test_begin_is_a_unit_of_work_of_its_own(real: Real, database: SyncDatabase) -> None:
    """Functions run in a thread or a task; one that fails is rolled back, and stops no other."""

    def store(note: str, then: Callable[[], object] = lambda: None) -> None:
        with database.begin() as session:
            assert get_sync_session() is session
            session.execute(ENTRY.insert().values(note=note))
            then()

    def fail() -> None:
        raise LookupError

    await to_thread.run_sync(store, "in a thread")
    store("in the task")
    with pytest.raises(LookupError):
        await to_thread.run_sync(store, "lost", fail)
    with anyio.CancelScope() as scope:
        await to_thread.run_sync(store, "cancelled", lambda: from_thread.run_sync(scope.cancel))
    assert real.stored() == ["in a thread", "in the task", "cancelled"]


async def test_the_lifespan_starts_and_stops_the_engine(real: Real) -> None:
    """The database runs during the application's own startup and shutdown."""
    description: Any = real.describe()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in (COMPLETE, STOPPED):
            await receive()
            with description.begin() as session:
                session.execute(ENTRY.insert().values(note=message["type"]))
            await send(message)

    assert await serve(DBSessionMiddleware(app, description), "lifespan") == [COMPLETE, STOPPED]
    assert real.stored() == [COMPLETE["type"], STOPPED["type"]]
    assert not description.is_running
    if real.is_postgresql:
        assert real.connections() == 0


async def test_a_lifespan_that_is_cancelled_stops_its_engines(real: Real) -> None:
    """Each function completes, although the scope cancels again and again."""
    first, second = real.describe(), real.describe()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert first.is_running
        assert second.is_running
        lifespan.cancel()
        await receive()

    with anyio.CancelScope() as lifespan:
        await serve(DBSessionMiddleware(app, first, second), "lifespan")
    assert lifespan.cancelled_caught
    assert not first.is_running
    assert not second.is_running


async def test_work_runs_to_completion_and_the_cancellation_comes_afterwards() -> None:
    """The cancellation is raised at the next await, and does not replace an error."""
    told: list[object] = []

    async def work(error: Exception | None = None) -> str:
        scope.cancel()
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        if error is not None:
            raise error
        return "done"

    with anyio.CancelScope() as scope:
        told.append(await run_to_completion(work()))
        await anyio.lowlevel.checkpoint()
        told.append("not cancelled")
    assert told == ["done"]
    assert scope.cancelled_caught
    with anyio.CancelScope() as scope, pytest.raises(LookupError):
        await run_to_completion(work(LookupError()))


async def test_an_async_database_says_what_to_use_instead() -> None:
    """SQLAlchemy's async engines need asyncio; the server gets one line that says so."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    middleware = DBSessionMiddleware(app, AsyncDatabase("sqlite+aiosqlite:///shop.db"))
    sent: list[Any] = []
    with pytest.raises(ConfigurationError):
        await serve(middleware, "lifespan", on_message=sent.append)
    (message,) = sent
    assert message["type"] == "lifespan.startup.failed"
    assert message["message"].endswith("Describe it as a SyncDatabase there.")


async def test_a_session_reads_what_another_request_stored(
    real: Real, database: SyncDatabase
) -> None:
    """A request returns its connection, and the next request uses it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        rows = select(ENTRY.c.note)
        read.append(await to_thread.run_sync(lambda: [*get_sync_session().scalars(rows)]))
        await write(f"row {len(read)}")
        await respond(send)

    read: list[list[str]] = []
    for _ in range(3):
        await serve(DBSessionMiddleware(app, database))
    assert read == [[], ["row 1"], ["row 1", "row 2"]]


async def test_a_request_that_lost_a_race_is_run_again(real: Real, database: SyncDatabase) -> None:
    """The request runs again with the same body, after a pause of trio."""
    bodies = []

    def lose() -> None:
        session = get_sync_session()
        if not real.is_sqlite:
            session.execute(
                text("DO $$ BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '40001'; END $$")
            )
        with real.reader.connect() as winner:
            winner.exec_driver_sql("BEGIN IMMEDIATE")
            session.execute(text("PRAGMA busy_timeout = 0"))
            session.execute(ENTRY.insert().values(note="lost"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])
        if len(bodies) == 1:
            await to_thread.run_sync(lose)
        await write("kept")
        await respond(send, 201)

    sent: list[Any] = []
    messages = iter([{"type": "http.request", "body": b"kept", "more_body": False}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/"}
    await DBSessionMiddleware(app, database, attempts=3)(scope, receive, send)
    assert [each.get("status") for each in sent] == [201, None]
    assert bodies == [b"kept"] * 2
    assert real.stored() == ["kept"]
