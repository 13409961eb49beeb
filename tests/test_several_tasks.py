"""Tests that the end of a unit of work never overlaps an operation on its session."""

import asyncio
from contextlib import nullcontext
from threading import Event
from time import sleep
from typing import Any

import pytest
from anyio import to_thread
from asgi import Exchange, get, respond
from conftest import ENTRY, WITH_MARIADB, Running, checked_out
from several import Entry, engine_of, orm
from sqlalchemy import event, select, text
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from asgi_dbsession import ConcurrentUse, DBSessionMiddleware, SessionClosed

pytestmark = pytest.mark.anyio
KINDS = WITH_MARIADB


def slow(running: Running) -> Any:
    """A statement that takes a while, so that another task can run meanwhile."""
    if running.real.is_postgresql:
        return text("SELECT pg_sleep(0.1)")
    if running.real.is_mariadb:
        return text("SELECT sleep(0.1)")
    return text(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 400000) "
        "SELECT count(*) FROM n"
    )


async def is_in_flight(running: Running) -> None:
    """Wait until the session of the request is in the middle of an operation."""
    while checked_out(running.database) == 0:
        await asyncio.sleep(0.001)


async def serve_innocent_requests(running: Running, number: int = 100) -> None:
    """Send many requests after the faulty one: each is stored, and none fails."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write(scope["path"])
        await respond(send)

    middleware = DBSessionMiddleware(app, running.database)
    paths = [f"/innocent/{number}" for number in range(number)]
    for path in paths:
        exchange = await get(middleware, path)
        assert (exchange.status, exchange.error) == (200, None)
    assert [note for note in running.stored() if note in paths] == paths


@pytest.mark.parametrize("warm", [True, False])
async def test_gather_over_one_session_is_refused_and_harms_nobody(
    running: Running, *, warm: bool
) -> None:
    """A full pool and an empty pool give the same error, which names `database.begin()`."""
    errors: list[BaseException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if warm:
            await running.execute(select(ENTRY))
        results = await asyncio.gather(
            *(running.execute(slow(running)) for _ in range(3)), return_exceptions=True
        )
        errors.extend(result for result in results if isinstance(result, BaseException))
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.status == 200
    assert [type(error) for error in errors] == [ConcurrentUse] * 2
    assert "database.begin()" in str(errors[0])
    await running.assert_clean()
    await serve_innocent_requests(running)


async def test_gather_that_fails_leaves_no_connection_in_a_transaction(running: Running) -> None:
    """The first error ends the handler while another statement still runs."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        await asyncio.gather(*(running.execute(slow(running)) for _ in range(3)))
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert isinstance(exchange.error, ConcurrentUse)
    await running.assert_clean()
    assert running.stored() == []
    await serve_innocent_requests(running)


@pytest.mark.parametrize("status", [200, 400])
async def test_the_end_waits_for_a_statement_that_outlives_its_request(
    running: Running, status: int
) -> None:
    """A task after its request completes its statement, and then gets `SessionClosed`."""
    tasks = []

    async def detached() -> None:
        await running.execute(slow(running))
        for number in range(1000):  # the first statements may come before the end of the request
            await running.write(f"late {number}")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(asyncio.create_task(detached()))
        await is_in_flight(running)
        await respond(send, status)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.status == status
    with pytest.raises(SessionClosed, match=r"database\.begin\(\)"):
        await tasks[0]
    await running.assert_clean()
    await serve_innocent_requests(running)


async def test_an_operation_that_meets_the_end_waits_for_it(running: Running) -> None:
    """COMMIT and the statement of another task run one after the other, and both succeed."""
    committed = asyncio.Event()
    tasks = []

    async def other() -> None:
        while not running.database.get_session().in_transaction():
            await asyncio.sleep(0)
        committed.set()
        # From here on COMMIT may run at any moment, and each of these statements must wait for it.
        for number in range(20):
            await running.write(f"other {number}")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("handler")
        tasks.append(asyncio.create_task(other()))
        await committed.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await tasks[0]
        await send({"type": "http.response.body", "body": b"end"})

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.complete
    assert exchange.error is None
    assert running.stored() == ["handler", *(f"other {number}" for number in range(20))]


@pytest.mark.parametrize("real", ["sqlite", "asyncpg", "asyncmy"], indirect=True)
@pytest.mark.parametrize("fails", [False, True])
async def test_a_close_that_meets_the_end_waits_for_it(running: Running, *, fails: bool) -> None:
    """A task that closes the session during COMMIT does not stop the COMMIT."""
    done: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    async def close() -> None:
        try:
            if fails:
                raise LookupError
        except LookupError:
            await running.call("close")
        else:
            await running.call("close")
        done.append("closed")

    def look(_: object) -> None:
        # COMMIT runs now, so the other task has enough time to start its operation.
        tasks.append(asyncio.get_running_loop().create_task(close()))
        await_only(asyncio.sleep(0.1))
        done.append("committed")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        event.listen(engine_of(running), "commit", look, once=True)
        await respond(send)
        await asyncio.wait(tasks)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (200, None)
    assert done == ["committed", "closed"]
    assert tasks[0].exception() is None
    assert running.stored() == ["kept"]


async def test_a_cancelled_handler_does_not_leave_its_threads_or_tasks_the_session(
    running: Running,
) -> None:
    """Their later operations are rolled back, and then refused."""
    tasks = []

    async def child() -> None:
        await running.write("lost")
        await running.execute(slow(running))
        await running.write("late")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(asyncio.create_task(child()))
        await asyncio.Event().wait()

    exchange = Exchange(DBSessionMiddleware(app, running.database))
    request = asyncio.create_task(exchange.run())
    await is_in_flight(running)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    with pytest.raises(SessionClosed):
        await tasks[0]
    await running.assert_clean()
    assert running.stored() == []


async def test_a_commit_never_queues_behind_handlers_for_a_thread(running: Running) -> None:
    """Handlers occupy all threads of the shared pool, and may wait for this COMMIT."""
    if not running.real.is_sync:
        pytest.skip("async sessions need no thread")
    stored = Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/waiting":
            assert await to_thread.run_sync(stored.wait, 10)
        else:
            running.database.get_session().execute(ENTRY.insert().values(note="kept"))
        await respond(send)

    middleware = DBSessionMiddleware(app, running.database)
    limiter = to_thread.current_default_thread_limiter()
    usual, limiter.total_tokens = limiter.total_tokens, 1
    waiting = asyncio.create_task(get(middleware, "/waiting"))
    await asyncio.sleep(0.01)
    assert limiter.available_tokens == 0
    exchange = await get(middleware, "/writing")
    stored.set()
    assert (await waiting).error is None
    limiter.total_tokens = usual
    assert exchange.status == 200
    assert running.stored() == ["kept"]


class Inner(BaseHTTPMiddleware):
    """With `@app.middleware("http")`, the application runs in a separate task."""

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        """Pass the request on."""
        response: Response = await call_next(request)
        return response


def below_base_http_middleware(running: Running, handler: Any) -> Starlette:
    """An application with a `BaseHTTPMiddleware` between our middleware and the handler."""
    app = Starlette(routes=[Route("/{path:path}", handler)])
    app.add_middleware(Inner)
    app.add_middleware(DBSessionMiddleware, running.database)
    return app


async def test_a_streaming_body_below_base_http_middleware_is_correct(running: Running) -> None:
    """Its first statement may come before, during or after the COMMIT of the start."""

    async def handler(request: Request) -> Response:
        path = request.url.path

        async def parts() -> Any:
            for number in range(5):
                await running.write(f"{path} body {number}")
                yield b"part"

        await running.write(f"{path} handler")
        return StreamingResponse(parts())

    app = below_base_http_middleware(running, handler)
    for number in range(20):
        exchange = await get(app, f"/{number}")
        assert (exchange.status, exchange.error, exchange.body) == (200, None, b"part" * 5)
        await running.assert_clean()
    assert running.stored() == [
        note
        for number in range(20)
        for note in (f"/{number} handler", *(f"/{number} body {part}" for part in range(5)))
    ]


async def test_a_body_that_fails_below_base_http_middleware_is_rolled_back(
    running: Running,
) -> None:
    """The middleware uses the session too, and then ends the response."""

    class Authenticating(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: Any) -> Response:
            await running.execute(select(ENTRY))
            response: Response = await call_next(request)
            return response

    async def parts() -> Any:
        yield b"part"
        await running.write("half")
        raise LookupError

    async def handler(request: Request) -> Response:
        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/", handler)])
    app.add_middleware(Authenticating)
    app.add_middleware(DBSessionMiddleware, running.database)
    exchange = await get(app)
    assert isinstance(exchange.error, LookupError)
    if not running.real.is_sync:  # threads show nothing about tasks
        assert running.stored() == []


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_a_streaming_response_is_stored_before_its_last_message(
    running: Running, spec_version: str
) -> None:
    """Below ASGI 2.4, Starlette runs the body in another task than the handler."""
    if running.real.is_sync:
        pytest.skip("what threads do says nothing of tasks")
    seen = []

    async def parts() -> Any:
        await running.write("body")
        yield b"part"

    async def handler(request: Request) -> Response:
        await running.write("handler")
        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/", handler)])
    app.add_middleware(DBSessionMiddleware, running.database)
    await get(app, spec_version=spec_version, on_message=lambda _: seen.append(running.stored()))
    assert seen == [["handler"], ["handler"], ["handler", "body"]]


async def test_a_background_task_below_base_http_middleware_is_a_whole_unit(
    running: Running,
) -> None:
    """The last body message comes from another task, and must not commit half of the work."""
    seen = []

    async def background() -> None:
        await running.write("background 1")
        await running.execute(slow(running))
        seen.append(running.stored())
        await running.write("background 2")

    async def handler(request: Request) -> Response:
        await running.write("handler")
        return PlainTextResponse("ok", background=BackgroundTask(background))

    exchange = await get(below_base_http_middleware(running, handler))
    assert exchange.complete
    assert seen == [["handler"]]
    assert running.stored() == ["handler", "background 1", "background 2"]


def stream_of_rows(running: Running) -> Any:
    """Enough rows for many fetches."""
    if running.real.is_postgresql:
        return text("SELECT i, repeat('x', 2000) FROM generate_series(1, 3000) AS i")
    if running.real.is_mariadb:
        return text("SELECT seq, repeat('x', 2000) FROM seq_1_to_3000")
    return text(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000) "
        "SELECT i, hex(zeroblob(1000)) FROM n"
    )


async def test_a_body_that_another_task_ends_commits_nothing_half_done(running: Running) -> None:
    """Only the task that opened the session can know that its work is complete."""
    half, sent = asyncio.Event(), asyncio.Event()
    seen = []

    async def work() -> None:
        running.database.get_session()
        await running.write("first half")
        half.set()
        await sent.wait()
        await running.write("second half")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        working = asyncio.create_task(work())
        await half.wait()
        await send({"type": "http.response.body"})
        seen.append(running.stored())
        sent.set()
        await working

    await get(DBSessionMiddleware(app, running.database))
    assert seen == [[]]
    assert running.stored() == ["first half", "second half"]


@pytest.mark.parametrize("status", [200, 400])
async def test_a_stream_of_rows_that_another_task_reads_cannot_poison_the_pool(
    running: Running, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """Its fetches do not use the session, so a COMMIT may break them, but no connection leaks."""
    if running.real.is_sync:
        pytest.skip("only async sessions stream rows")
    tasks = []

    async def read() -> None:
        session: Any = running.database.get_session()
        try:
            async for _ in await session.stream(stream_of_rows(running)):
                started.set()
        finally:
            started.set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write(scope["path"])
        tasks.append(asyncio.create_task(read()))
        await started.wait()
        await respond(send, status)

    middleware = DBSessionMiddleware(app, running.database)
    for number in range(20):
        started = asyncio.Event()
        exchange = await get(middleware, f"/{number}")
        await asyncio.gather(*tasks, return_exceptions=True)
        await running.assert_clean()
        if exchange.status == 200:
            assert f"/{number}" in running.stored()
        if exchange.status == 400:
            assert f"/{number}" not in running.stored()
    caplog.clear()  # the pool may log that it could not close the cursor of a broken stream
    await serve_innocent_requests(running)


async def test_a_stream_of_rows_in_the_body_is_read_to_its_end(running: Running) -> None:
    """A stream that opens the cursor itself can export any number of rows."""
    if running.real.is_sync:
        pytest.skip("only async sessions stream rows")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("handler")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        session: Any = running.database.get_session()
        async for _ in await session.stream(stream_of_rows(running)):
            await send({"type": "http.response.body", "body": b".", "more_body": True})
        await send({"type": "http.response.body"})

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.error, len(exchange.body)) == (None, 3000)
    assert running.stored() == ["handler"]


async def test_savepoints_take_turns_like_statements(running: Running) -> None:
    """RELEASE SAVEPOINT is an operation too, so COMMIT waits for it."""
    if running.real.is_sync:
        pytest.skip("a blocking `with` has no place between its statements for another task")
    tasks = []
    released = asyncio.Event()

    async def nested() -> None:
        session: Any = running.database.get_session()
        for number in range(10):
            async with session.begin_nested():
                await running.write(f"nested {number}")
            released.set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        tasks.append(asyncio.create_task(nested()))
        await released.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.gather(*tasks, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"end"})

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.error is None
    await running.assert_clean()
    await serve_innocent_requests(running)


@pytest.mark.parametrize("joined", [False, True])
async def test_background_work_that_is_mixed_with_that_of_a_failed_task_is_rolled_back(
    running: Running, joined: bool
) -> None:
    """The server gets the error, and no connection is left behind.

    The end of a `begin(join=True)` block commits nothing, so it forgets no task.
    """
    if running.real.is_sync:
        pytest.skip("what threads do says nothing of tasks")

    async def fail() -> None:
        await running.write("half")
        raise LookupError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        await asyncio.wait([asyncio.create_task(fail())])
        block: Any = running.database.begin(join=True) if joined else nullcontext()
        async with block:
            await running.write("own")

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.status == 200
    assert isinstance(exchange.error, ConcurrentUse)
    assert running.stored() == []
    await running.assert_clean()


async def test_what_a_failed_task_adds_during_a_commit_is_never_stored(running: Running) -> None:
    """The object is in memory only when the work of the task is rolled back."""
    if running.real.is_sync:
        pytest.skip("what threads do says nothing of tasks")
    committing = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()

        async def fail() -> None:
            await committing.wait()
            session.add(Entry("of the failed task"))
            raise LookupError

        await send({"type": "http.response.start", "status": 200, "headers": []})
        await running.write("own")
        child = asyncio.create_task(fail())
        await send({"type": "http.response.body", "body": b"end"})
        await asyncio.wait([child])
        assert isinstance(child.exception(), LookupError)

    event.listen(engine_of(running), "commit", lambda _: committing.set())
    await get(DBSessionMiddleware(app, running.database))
    assert running.stored() == ["own"]
    await running.assert_clean()


@pytest.mark.parametrize("does", ["adds", "changes"])
async def test_what_a_task_does_during_a_commit_is_rolled_back_with_a_500(
    running: Running, does: str
) -> None:
    """Background work of the same request does not store it."""
    if running.real.is_sync:
        pytest.skip("what threads do says nothing of tasks")
    committing = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()
        own = Entry("own")

        async def work() -> None:
            await committing.wait()
            if does == "adds":
                with pytest.raises(ConcurrentUse, match=r"database.begin\(\)"):
                    session.add(Entry("too early"))
            else:
                own.note = "of a request that failed"

        session.add(own)
        await session.flush()
        child = asyncio.create_task(work())
        await session.commit()
        await child
        await respond(send, 500)
        await running.write("background")

    event.listen(engine_of(running), "commit", lambda _: committing.set())
    await get(DBSessionMiddleware(app, running.database))
    assert running.stored() == ["own", "background"]
    await running.assert_clean()


@pytest.mark.parametrize(
    "change",
    [
        lambda session: session.add(Entry("too early")),
        lambda session: session.add_all([Entry("too early")]),
        lambda session: session.expire_all(),
        lambda session: session.expunge_all(),
    ],
)
async def test_objects_cannot_change_during_the_statement_of_another_task(
    running: Running, change: Any
) -> None:
    """Tasks and threads that use one session at the same time always get an error."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()
        statement = asyncio.create_task(running.execute(slow(running)))
        await is_in_flight(running)
        with pytest.raises(ConcurrentUse, match=r"database.begin\(\)"):
            await in_thread_of(running, change, session)
        await statement
        await in_thread_of(running, change, session)
        session.expunge_all()
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (200, None)
    await running.assert_clean()


async def in_thread_of(running: Running, change: Any, session: Any) -> None:
    """Call a function where a handler of this kind would call it."""
    if running.real.is_sync:
        await to_thread.run_sync(change, session)
    else:
        change(session)


@pytest.mark.parametrize("fails", [False, True])
async def test_what_another_task_adds_during_a_commit_is_not_a_part_of_it(
    running: Running, *, fails: bool
) -> None:
    """Below a `BaseHTTPMiddleware`, a body runs during the COMMIT of the start."""
    flushing = asyncio.Event()
    loop = asyncio.get_running_loop()
    seen = []

    def tell(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT"):
            loop.call_soon_threadsafe(flushing.set)
            if running.real.is_sync:
                sleep(0.05)  # let the body call `add()` meanwhile

    async def handler(request: Request) -> Response:
        session = orm(running)

        async def parts() -> Any:
            await flushing.wait()
            session.add(Entry("body"))
            yield b"part"
            if fails:
                raise LookupError

        session.add(Entry("handler"))
        return StreamingResponse(parts())

    app = below_base_http_middleware(running, handler)
    event.listen(engine_of(running), "before_cursor_execute", tell)
    exchange = Exchange(app, on_message=lambda _: seen.append(running.stored()))
    await asyncio.wait_for(exchange.run(), 10)
    assert isinstance(exchange.error, LookupError if fails else type(None))
    assert seen[0] == ["handler"]
    # The work of a thread counts as the work of the task that opened the session.
    if not (fails and running.real.is_sync):
        assert running.stored() == (["handler"] if fails else ["handler", "body"])
    await running.assert_clean()


async def test_what_a_callback_adds_during_a_commit_is_stored_later(running: Running) -> None:
    """A callback of a task runs in no task, and cannot wait for the COMMIT."""
    if running.real.is_sync:
        pytest.skip("COMMIT runs in a thread there")
    committing = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = orm(running)
        session.add(Entry("handler"))
        task = asyncio.create_task(committing.wait())
        task.add_done_callback(lambda _: session.add(Entry("callback")))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert running.stored() == ["handler"]
        await asyncio.wait([task])
        await send({"type": "http.response.body", "body": b"ok"})

    event.listen(engine_of(running), "commit", lambda _: committing.set())
    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.error is None
    assert running.stored() == ["handler", "callback"]
    await running.assert_clean()


async def test_nothing_can_be_added_during_the_last_rollback(running: Running) -> None:
    """The object would be lost, so a task that outlives its request gets an error."""
    if running.real.is_sync:
        pytest.skip("what threads do says nothing of tasks")
    ending = asyncio.Event()
    late: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()

        async def add() -> None:
            await ending.wait()
            session.add(Entry("late"))

        await running.write("rolled back")
        late.append(asyncio.create_task(add()))
        await asyncio.sleep(0)
        raise LookupError

    event.listen(engine_of(running), "rollback", lambda _: ending.set())
    await get(DBSessionMiddleware(app, running.database))
    with pytest.raises(SessionClosed):
        await late[0]
    await running.assert_clean()


async def test_a_change_that_fails_after_a_commit_rolls_the_later_work_back(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The task has gone on, so it cannot get the error of its `add()` any more."""
    if running.real.is_sync:
        pytest.skip("what threads do says nothing of tasks")
    committing = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()

        async def add() -> None:
            await committing.wait()
            session.add("no mapped object")

        await running.write("handler")
        child = asyncio.create_task(add())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await child
        await running.write("body")
        await send({"type": "http.response.body", "body": b"end"})

    event.listen(engine_of(running), "commit", lambda _: committing.set())
    exchange = await get(DBSessionMiddleware(app, running.database))
    assert isinstance(exchange.error, ConcurrentUse)
    assert not exchange.complete
    assert running.stored() == ["handler"]
    assert "UnmappedInstanceError" in caplog.text
    await running.assert_clean()


async def test_no_listener_hears_of_a_commit_of_a_failed_task(running: Running) -> None:
    """An outbox publishes in `after_commit`; an audit adds a row in `before_commit`."""
    if running.real.is_sync:
        pytest.skip("what threads do says nothing of tasks")
    heard: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        session: Any = running.database.get_session()
        for name in ("before_commit", "after_commit", "after_rollback"):
            event.listen(session.sync_session, name, lambda _, name=name: heard.append(name))

        async def fail() -> None:
            await running.write("half")
            raise LookupError

        await asyncio.wait([asyncio.create_task(fail())])

    await get(DBSessionMiddleware(app, running.database))
    assert heard == ["after_rollback"]
    assert running.stored() == []
    await running.assert_clean()


@pytest.mark.parametrize("turns", range(10))
async def test_a_request_cancelled_while_a_failed_task_is_rolled_back_closes_all(
    running: Running, turns: int
) -> None:
    """The sessions of the other databases are closed too."""
    if running.real.kind != "asyncpg":
        pytest.skip("one driver is enough")
    other = running.real.describe()
    has_returned = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def fail() -> None:
            await running.write("half")
            raise LookupError

        await respond(send)
        await asyncio.wait([asyncio.create_task(fail())])
        session: Any = other.get_session()
        await session.execute(ENTRY.insert().values(note="own"))
        has_returned.set()

    async with other:
        request = asyncio.create_task(get(DBSessionMiddleware(app, running.database, other)))
        await has_returned.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait([request])
        assert checked_out(other) == 0
    assert running.stored() in ([], ["own"])
    await running.assert_clean()


async def test_a_session_class_with_a_close_of_its_own_has_no_work_of_failed_tasks(
    running: Running,
) -> None:
    """The application has rolled back what the task left, and committed its own work itself."""
    if running.real.is_sync:
        pytest.skip("what threads do says nothing of tasks")

    class Closing(Session):
        def close(self) -> None:
            super().close()

    database: Any = running.real.describe(session_options={"sync_session_class": Closing})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = database.get_session()

        async def fail() -> None:
            await session.execute(select(ENTRY))
            raise LookupError

        await respond(send)
        await asyncio.wait([asyncio.create_task(fail())])
        await session.rollback()
        await session.execute(ENTRY.insert().values(note="own"))
        await session.commit()

    async with database:
        exchange = await get(DBSessionMiddleware(app, database))
        assert exchange.error is None
        assert checked_out(database) == 0
    assert running.stored() == ["own"]


async def test_a_session_is_closed_although_the_rollback_of_its_failed_task_raises(
    running: Running,
) -> None:
    """A listener of the application stops it, and a task that outlives the request goes on."""
    if running.real.is_sync:
        pytest.skip("what threads do says nothing of tasks")
    session: Any = None

    class Stop(BaseException):
        """Raised by a listener, as a time limit in a signal handler does."""

    def stop(*_: object) -> None:
        raise Stop

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal session
        await respond(send)
        session = running.database.get_session()

        async def fail() -> None:
            await running.write("half")
            raise LookupError

        await asyncio.wait([asyncio.create_task(fail())])
        event.listen(session.sync_session, "after_rollback", stop, once=True)

    with pytest.raises(Stop):
        await get(DBSessionMiddleware(app, running.database))
    with pytest.raises(SessionClosed):
        await session.execute(select(ENTRY))
    assert running.stored() == []
    await running.assert_clean()


@pytest.mark.parametrize("kind_of_error", [Exception, BaseException])
async def test_a_close_that_is_interrupted_leaves_no_connection_behind(
    running: Running, kind_of_error: type[BaseException]
) -> None:
    """A signal handler raises the exception before it is known which sessions have work."""
    interrupts: list[BaseException] = []

    class Stop(kind_of_error):  # type: ignore[misc, valid-type]
        """Raised by a signal handler."""

    class Interrupted(Session):
        def in_transaction(self) -> bool:
            if interrupts:
                raise interrupts.pop()
            return super().in_transaction()

    option = "class_" if running.real.is_sync else "sync_session_class"
    database: Any = running.real.describe(session_options={option: Interrupted})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        await running.execute(ENTRY.insert().values(note="late"), database)
        interrupts.append(Stop())

    async with database:
        exchange = Exchange(DBSessionMiddleware(app, database))
        try:
            await exchange.run()
        except Stop as stop:
            exchange.error = stop
        assert isinstance(exchange.error, Stop)
        assert checked_out(database) == 0
    assert running.stored() == []
    await running.assert_clean()


async def test_a_block_stores_the_work_of_a_failed_task_whose_error_it_has_caught(
    running: Running,
) -> None:
    """The code of the block knows of the error, and has decided to go on."""
    if running.real.is_sync:
        pytest.skip("what threads do says nothing of tasks")
    database: Any = running.database

    async def fail() -> None:
        await running.write("by the task")
        raise LookupError

    async with database.begin():
        with pytest.raises(LookupError):
            await asyncio.create_task(fail())
        await running.write("by the block")
    assert running.stored() == ["by the task", "by the block"]
