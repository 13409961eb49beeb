"""After any cancellation at any point, no work is half stored and no connection is open."""

import asyncio
import io
import threading
import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import Any, Self

import aiosqlite
import anyio
import pytest
from asgi import Exchange, get, respond
from conftest import ENTRY, Real, Running, becomes_true, checked_out
from several import Entry, orm, swallow_an_error
from sqlalchemy import event, select, text
from sqlalchemy.util import await_only

from asgi_dbsession import DBSessionMiddleware, SyncDatabase

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("no_collections"),
]

WAYS = ("native", "native twice", "native from outside", "anyio", "anyio from outside")


class Awaits:
    """Counts the awaits of all tasks of the running loop, and acts at chosen ones.

    Args:
        at: The number of the first await to act at.
        times: How many awaits in a row to act at.
        act: What to do, in the middle of the step that is about to wait.
    """

    def __init__(self, at: int, times: int, act: Callable[[], object]) -> None:
        self.count = 0
        self._acting = range(at, at + times)
        self._act = act

    def __enter__(self) -> Self:
        asyncio.get_running_loop().set_task_factory(self._make_task)
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.get_running_loop().set_task_factory(None)

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any
    ) -> asyncio.Task[Any]:
        async def counted() -> Any:
            return await self._count(work)

        task = asyncio.Task(counted(), loop=loop, **options)
        # A task that is cancelled before its first step never awaits its work.
        task.add_done_callback(lambda _: work.close())
        return task

    @types.coroutine
    def _count(self, work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        resume: Callable[[], Any] = lambda: work.send(None)  # noqa: E731
        while True:
            try:
                waited_for = resume()
            except StopIteration as stop:
                return stop.value
            self.count += 1
            if self.count in self._acting:
                self._act()
            try:
                value = yield waited_for
            except BaseException as error:
                resume = _thrower(work, error)
            else:
                resume = _sender(work, value)


def _thrower(work: Coroutine[Any, Any, Any], error: BaseException) -> Callable[[], Any]:
    return lambda: work.throw(error)


def _sender(work: Coroutine[Any, Any, Any], value: Any) -> Callable[[], Any]:
    return lambda: work.send(value)


async def run_and_cancel(
    running: Running, exchange: Exchange, at: int, way: str
) -> tuple[bool, BaseException | None]:
    """Cancel a request at its `at`-th await; return if it had so many awaits, and the result."""
    scope = anyio.CancelScope()

    async def serve() -> None:
        with scope:
            await exchange.app(exchange.scope, exchange._receive, exchange._send)

    def cancel() -> None:
        if way.startswith("anyio"):
            scope.cancel()
        else:
            request.cancel()

    def cancel_from_outside() -> None:
        # Cancel from another context once the request waits, as a server or a time-out does.
        asyncio.get_running_loop().call_soon(cancel, context=Context())

    act = cancel_from_outside if way.endswith("from outside") else cancel
    with Awaits(at, 2 if way == "native twice" else 1, act) as awaits:
        request = asyncio.get_running_loop().create_task(serve())
        (outcome,) = await asyncio.gather(request, return_exceptions=True)
    return awaits.count >= at, outcome


@pytest.mark.parametrize("way", WAYS)
async def test_a_request_cancelled_at_any_await_leaves_nothing_behind(
    running: Running, way: str
) -> None:
    """Cancel a request with a handler, a streaming body and a background task at each await.

    Each of the three is stored whole or not at all; the handler, if the client got its status;
    and the next request finds every connection clean.
    """

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write(scope["path"] + " handler 1")
        await running.execute(select(ENTRY))
        await running.write(scope["path"] + " handler 2")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await running.write(scope["path"] + " body 1")
        await running.write(scope["path"] + " body 2")
        await send({"type": "http.response.body", "body": b"end"})
        await running.write(scope["path"] + " background 1")
        await running.write(scope["path"] + " background 2")

    middleware = DBSessionMiddleware(app, running.database)
    at, reached = 0, True
    while reached:
        at += 1
        exchange = Exchange(middleware, f"/{at}")
        reached, outcome = await run_and_cancel(running, exchange, at, way)
        if not way.startswith("anyio") and reached:
            assert isinstance(outcome, asyncio.CancelledError)
        await running.assert_clean()
        stored = [note.split()[1:] for note in running.stored() if note.startswith(f"/{at} ")]
        units = [unit for unit, _ in stored]
        assert [number for _, number in stored] == ["1", "2"] * (len(stored) // 2), stored
        assert units == sorted(units, key=["handler", "body", "background"].index)
        if exchange.status == 200:
            assert "handler" in units
    assert at > 8
    assert stored == [
        [unit, number] for unit in ("handler", "body", "background") for number in "12"
    ]


@pytest.mark.parametrize("way", WAYS)
async def test_a_refused_commit_of_the_handlers_own_can_be_cancelled_at_any_await(
    running: Running, way: str
) -> None:
    """A transaction that COMMIT refuses is rolled back before its connection is returned."""
    if not running.real.is_postgresql or isinstance(running.database, SyncDatabase):
        pytest.skip("only PostgreSQL aborts a transaction, and a thread cannot be cancelled")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = running.database.get_session()
        session.add(Entry("lost"))
        event.listen(orm(running), "after_flush", swallow_an_error, once=True)
        await session.commit()
        await respond(send)

    at, reached = 0, True
    while reached:
        at += 1
        exchange = Exchange(DBSessionMiddleware(app, running.database))
        reached, _ = await run_and_cancel(running, exchange, at, way)
        assert exchange.status is None
        await running.assert_clean()
        async with running.database.begin() as session:
            session.add(Entry(f"innocent {at}"))
    assert at > 5
    assert running.stored() == [f"innocent {number + 1}" for number in range(at)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", ["/rolled-back", "/doomed"])
async def test_an_end_without_commit_cancelled_at_any_await_leaves_nothing_behind(
    running: Running, way: str, path: str
) -> None:
    """Neither a ROLLBACK nor a failed COMMIT can be interrupted."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        if path == "/doomed":
            await running.doom()
        await respond(send, 200 if path == "/doomed" else 400)

    at, reached = 0, True
    while reached:
        at += 1
        exchange = Exchange(DBSessionMiddleware(app, running.database), path)
        reached, _ = await run_and_cancel(running, exchange, at, way)
        await running.assert_clean()
        assert running.stored() == []
        if path == "/doomed":
            assert exchange.messages == []


@pytest.mark.parametrize("way", WAYS)
async def test_begin_cancelled_at_any_await_leaves_nothing_behind(
    running: Running, way: str
) -> None:
    """A unit of work outside of a request keeps the same promises."""
    database = running.database
    if isinstance(database, SyncDatabase):
        pytest.skip("a `with` block on a thread cannot be cancelled")

    async def work(scope: Any, receive: Any, send: Any) -> None:
        async with database.begin():
            await running.write(scope["path"] + " 1")
            await running.write(scope["path"] + " 2")

    at, reached = 0, True
    while reached:
        at += 1
        reached, _ = await run_and_cancel(running, Exchange(work, f"/{at}"), at, way)
        await running.assert_clean()
        stored = [note for note in running.stored() if note.startswith(f"/{at} ")]
        assert stored in ([], [f"/{at} 1", f"/{at} 2"])
    assert stored


@pytest.mark.parametrize("awaiting", ["in a thread", "within a time limit", "another session"])
async def test_what_a_listener_awaits_during_commit_is_not_cancelled_either(
    running: Running, awaiting: str
) -> None:
    """Test anyio scopes and time limits inside COMMIT, and around the whole request."""
    database = running.database
    if isinstance(database, SyncDatabase):
        pytest.skip("a listener has nothing to await in a thread")
    waits: list[None] = []

    async def wait() -> None:
        waits.append(None)
        asyncio.get_running_loop().call_later(0.05, scope.cancel, context=Context())
        if awaiting == "in a thread":
            await anyio.to_thread.run_sync(lambda: threading.Event().wait(0.1))
        elif awaiting == "within a time limit":
            with anyio.fail_after(60):
                await anyio.sleep(0.1)
        else:
            async with asyncio.timeout(60), database.begin() as session:
                await asyncio.sleep(0.1)
                await session.execute(select(ENTRY))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        event.listen(orm(running), "before_commit", lambda _: await_only(wait()), once=True)
        await respond(send)

    exchange = Exchange(DBSessionMiddleware(app, database))
    with anyio.CancelScope() as scope:
        await exchange.run()
    assert scope.cancelled_caught
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert len(waits) == 1
    assert exchange.messages == []
    assert running.stored() == ["kept"]
    await running.assert_clean()


async def test_a_client_that_hangs_up_during_commit_is_told_nothing_untrue(
    running: Running,
) -> None:
    """Uvicorn speaks ASGI 2.3, under which Starlette cancels its stream when the client is gone."""
    from starlette.responses import StreamingResponse  # noqa: PLC0415

    async def parts() -> Any:
        yield b"part"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write(scope["path"])
        await StreamingResponse(parts())(scope, receive, send)

    for at in range(1, 12):
        exchange = Exchange(DBSessionMiddleware(app, running.database), f"/{at}")
        with Awaits(at, 1, exchange.hang_up.set):
            await asyncio.get_running_loop().create_task(exchange.run())
        await running.assert_clean()
        if exchange.status is not None:
            assert f"/{at}" in running.stored()
    assert (await get(DBSessionMiddleware(app, running.database), "/last")).complete


async def test_a_cancelled_statement_does_not_lock_the_database(running: Running) -> None:
    """The transaction around the stream does not stay open until the garbage collection."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write(scope["path"])
        if scope["path"].startswith("/cancelled"):
            current = asyncio.current_task()
            assert current is not None
            asyncio.get_running_loop().call_later(0.002, current.cancel)
            for _ in range(1000):
                await running.execute(select(ENTRY))
        await respond(send)

    if running.real.kind == "sqlite-sync":
        # Without a WAL, the result of a thread whose caller was cancelled keeps a lock on the file
        # until the garbage collector frees the result.
        with running.real.reader.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    middleware = DBSessionMiddleware(app, running.database)
    for number in range(20):
        request = asyncio.create_task(get(middleware, f"/cancelled/{number}"))
        await asyncio.gather(request, return_exceptions=True)
        exchange = await get(middleware, f"/kept/{number}")
        assert (exchange.status, exchange.error) == (200, None)
    assert running.stored() == [f"/kept/{number}" for number in range(20)]


@pytest.mark.parametrize("real", ["asyncpg"], indirect=True)
async def test_a_cancelled_copy_out_ends_within_the_drivers_time_limit(real: Real) -> None:
    """The driver waits for an answer that it has read already, without a limit of its own.

    It happens to every fourth cancellation or so. Without `command_timeout`, ROLLBACK then waits
    forever: the page on PostgreSQL says so.
    """
    database = real.describe(connect_args={"command_timeout": 0.2}, pool_size=1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        connection = await database.get_session().connection()
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.copy_from_query("SELECT 'text'", output=io.BytesIO())
        await respond(send)

    async with database:
        middleware = DBSessionMiddleware(app, database)
        with anyio.fail_after(60):
            for turns in [*range(12)] * 3:
                request = asyncio.create_task(get(middleware))
                for _ in range(turns):
                    await asyncio.sleep(0)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)
                assert checked_out(database) == 0
                assert (await get(middleware)).status == 200
    assert real.open_transactions() == 0


@pytest.mark.parametrize("real", ["asyncpg"], indirect=True)  # one driver is enough
def test_an_end_that_is_cancelled_with_its_loop_lets_the_loop_go(real: Real) -> None:
    """A server that stops at once cancels all tasks, also tasks that must complete."""
    database = real.describe()

    async def serve() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            session: Any = database.get_session()
            child = asyncio.create_task(session.execute(text("SELECT pg_sleep(5)")))
            while checked_out(database) == 0:
                await asyncio.sleep(0.001)
            await respond(send)
            await child

        await database.startup()
        requests.append(asyncio.create_task(get(DBSessionMiddleware(app, database))))
        await asyncio.sleep(0.1)

    requests: list[asyncio.Task[Exchange]] = []

    def run() -> None:
        asyncio.run(serve())  # cancels the remaining tasks, and waits for them

    # Run it in a thread: even a time limit could not leave an event loop that never ends.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "the loop waits for ever"
    assert requests[0].done()
    asyncio.run(becomes_true(lambda: real.open_transactions() == 0))


@pytest.mark.parametrize("real", ["sqlite", "asyncpg", "psycopg"], indirect=True)
async def test_a_task_factory_of_the_loop_makes_every_task_that_commits(running: Running) -> None:
    """Some tools install a task factory, to trace or count tasks; they see COMMIT too."""
    made: set[Any] = {asyncio.current_task()}
    committing: list[Any] = []

    def make(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **options)
        made.add(task)
        return task

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        await respond(send)

    engine: Any = running.database.engine
    event.listen(engine.sync_engine, "commit", lambda _: committing.append(asyncio.current_task()))
    asyncio.get_running_loop().set_task_factory(make)
    try:
        await get(DBSessionMiddleware(app, running.database))
    finally:
        asyncio.get_running_loop().set_task_factory(None)
    assert committing
    assert made.issuperset(committing)


@pytest.mark.parametrize("real", ["sqlite"], indirect=True)
async def test_sqlite_connects_in_the_task_of_the_request(real: Real) -> None:
    """A cancelled connect in another task would leave the file of the database open."""
    tasks = []

    async def connect() -> Any:
        tasks.append(asyncio.current_task())
        return await aiosqlite.connect(str(real.url.database))

    async with real.describe(async_creator=connect, ping_on_startup=False) as database:
        running = Running(real, database)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await running.execute(select(ENTRY))
            await respond(send)

        assert (await get(DBSessionMiddleware(app, database))).status == 200
    assert tasks == [asyncio.current_task()]
