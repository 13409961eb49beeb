"""A request that gets no connection in time gets a 503, and the next request is served."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from anyio import to_thread
from asgi import Exchange, Socket, get, respond
from conftest import ENTRY, Real, Running, checked_out, postgresql
from pages import Page
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, TimeoutError as PoolTimeout
from sqlalchemy.orm import registry
from starlette.responses import PlainTextResponse

from asgi_dbsession import DBSessionMiddleware, SyncDatabase, set_rollback
from asgi_dbsession.errors import AbortRequest

pytestmark = pytest.mark.anyio

KINDS = ("sqlite", "sqlite-sync", "asyncpg", "psycopg-sync", "asyncmy")
BUSY = [(b"content-type", b"text/plain"), (b"retry-after", b"2")]


@pytest.fixture
async def running(real: Real) -> AsyncIterator[Running]:
    """A pool of one connection, with a very short time-out."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    async with real.describe(**options) as database:
        yield Running(real, database)
        await real.assert_clean(database)


@asynccontextmanager
async def exhausted(running: Running) -> AsyncIterator[None]:
    """Let another unit of work hold the one connection."""
    database = running.database
    if isinstance(database, SyncDatabase):
        with database.engine.connect():
            yield
    else:
        async with database.engine.connect():
            yield


def ours(app: Any, running: Running, **options: Any) -> DBSessionMiddleware:
    return DBSessionMiddleware(app, running.database, **{"retry_after": 2} | options)


def is_busy(exchange: Exchange) -> bool:
    """Return True if the 503 is the only response."""
    return (
        exchange.messages
        == [
            {"type": "http.response.start", "status": 503, "headers": BUSY},
            {"type": "http.response.body", "body": b"Service Unavailable"},
        ]
        and not exchange.error
    )


async def write(running: Running, scope: Any, receive: Any, send: Any) -> None:
    await running.write("kept")
    await respond(send, 201)


async def test_it_is_answered_503_and_recovers(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The response says after how many seconds to try again; the log names the request."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await write(running, scope, receive, send)

    async with exhausted(running):
        assert is_busy(await get(ours(app, running)))
    (record,) = [each for each in caplog.records if each.name == "asgi_dbsession"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("answered 503: '/'")
    assert (await get(ours(app, running))).status == 201
    assert running.stored() == ["kept"]


async def test_a_crowd_is_served_or_told_to_come_back(running: Running) -> None:
    """Each request is either stored or refused, and the pool is complete afterwards."""
    leave = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write(scope["path"])
        await leave.wait()
        await respond(send, 201)

    serving = ours(app, running)
    requests = [asyncio.create_task(get(serving, f"/{number}")) for number in range(10)]
    # All requests except the one with the connection.
    while sum(each.done() for each in requests) < 9:
        await asyncio.sleep(0.01)
    leave.set()
    exchanges = await asyncio.gather(*requests)
    assert sorted(each.status or 0 for each in exchanges) == [201] + [503] * 9
    served = [each.scope["path"] for each in exchanges if each.status == 201]
    assert running.stored() == served


async def test_a_wait_that_only_commit_begins_is_in_vain_too(running: Running) -> None:
    """Added objects need the pool at COMMIT; `on_commit_error` may answer this error."""

    class Entry:
        note: str

    mapping = registry()
    mapping.map_imperatively(Entry, ENTRY)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        entry = Entry()
        entry.note = "kept"
        running.database.get_session().add(entry)
        await respond(send, 201)

    def answer(status: int) -> Any:
        return lambda _: PlainTextResponse("full", status)

    async with exhausted(running):
        assert is_busy(await get(ours(app, running)))
        assert is_busy(await get(ours(app, running, on_commit_error=answer(500))))
        assert (await get(ours(app, running, on_commit_error=answer(429)))).status == 429
    assert (await get(ours(app, running))).status == 201
    mapping.dispose()


async def test_a_framework_that_answers_500_answers_503(running: Running) -> None:
    """Nothing of its own response is sent."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await write(running, scope, receive, send)
        except PoolTimeout:
            await respond(send, 500)

    async with exhausted(running):
        assert is_busy(await get(ours(app, running)))


async def test_a_framework_that_swallows_everything_says_it_once(running: Running) -> None:
    """A handler that continues after the refusal sends nothing either."""
    refused: list[type[BaseException]] = []
    late = {"type": "http.response.body", "body": b"late"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(PoolTimeout):
            await write(running, scope, receive, send)
        for attempt in (respond(send, 500), respond(send, 500), send(late)):
            try:
                await attempt
            except BaseException as error:
                refused.append(type(error))

    async with exhausted(running):
        assert is_busy(await get(ours(app, running)))
    assert refused == [AbortRequest] * 3


@pytest.mark.parametrize("wrapped", [False, True])
async def test_what_an_error_became_on_its_way_is_known(running: Running, wrapped: bool) -> None:
    """The error of the pool is in a group, or the cause of another error, or both."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def work() -> None:
            try:
                await write(running, scope, receive, send)
            except PoolTimeout as error:
                raise RuntimeError from error

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(work())
        except ExceptionGroup as error:
            if wrapped:
                raise LookupError from error
            raise

    async with exhausted(running):
        assert is_busy(await get(ours(app, running)))


@pytest.mark.parametrize("first", ["wait", "other"])
async def test_a_wait_beside_another_error_in_a_group_is_answered_503(
    running: Running, first: str
) -> None:
    """Several tasks of one group fail: one without a connection, another with its own error."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        errors: list[Exception] = [LookupError()]
        try:
            await running.write("kept")
        except PoolTimeout as error:
            errors.insert(0 if first == "wait" else 1, error)
        raise ExceptionGroup("both", errors) from None

    async with exhausted(running):
        assert is_busy(await get(ours(app, running)))


@pytest.mark.parametrize("status", [200, 409, 503])
async def test_an_application_that_gets_over_it_answers_for_itself(
    running: Running, status: int
) -> None:
    """All of its messages are withheld, early hints too."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(PoolTimeout):
            await running.write("kept")
        await send({"type": "http.response.early_hint", "links": []})
        await respond(send, status, b"mine")

    async with exhausted(running):
        exchange = await get(ours(app, running))
    assert (exchange.status, exchange.body) == (status, b"mine")
    assert exchange.kinds[0] == "response.early_hint"


async def test_a_500_that_was_committed_is_sent(running: Running) -> None:
    """A client may repeat a request after a 503, and would then store its work twice."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with exhausted(running):
            with pytest.raises(PoolTimeout):
                await running.write("lost")
        await running.call("rollback")
        await running.write("kept")
        set_rollback(False)
        await respond(send, 500)

    assert (await get(ours(app, running))).status == 500
    assert running.stored() == ["kept"]


async def test_no_other_error_hides_behind_it(running: Running) -> None:
    """An error after a handled time-out is raised unchanged."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(PoolTimeout):
            await running.write("kept")
        raise ZeroDivisionError

    async with exhausted(running):
        exchange = await get(ours(app, running))
    assert isinstance(exchange.error, ZeroDivisionError)
    assert exchange.messages == []


async def test_a_connection_of_the_engines_may_be_waited_for_too(running: Running) -> None:
    """The handler uses the engine, not the session."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with exhausted(running):
            pytest.fail("there was a connection")

    async with exhausted(running):
        assert is_busy(await get(ours(app, running)))


async def test_an_error_without_a_wait_is_not_touched(running: Running) -> None:
    """A status of 500 is sent unchanged."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("same")
        if scope["path"] == "/raise":
            await running.write("same")
        await respond(send, 500)

    exchange = await get(ours(app, running), "/raise")
    assert isinstance(exchange.error, IntegrityError)
    assert (await get(ours(app, running))).status == 500


async def test_never_after_the_response_has_started(running: Running) -> None:
    """The error of a streaming body is raised to the server."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await running.write("kept")

    async with exhausted(running):
        exchange = await get(ours(app, running))
    assert isinstance(exchange.error, PoolTimeout)
    assert exchange.kinds == ["response.start"]


async def test_what_needs_no_database_is_served_all_the_same(running: Running) -> None:
    """A session without statements waits for no connection."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        running.database.get_session()
        await respond(send)

    async with exhausted(running):
        assert (await get(ours(app, running))).status == 200


async def test_it_is_a_choice(running: Running) -> None:
    """By default the application gets the pool's error; on a WebSocket always."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")

    async with exhausted(running):
        exchange = await get(ours(app, running, retry_after=None))
        assert isinstance(exchange.error, PoolTimeout)
        socket = await Socket(ours(app, running)).run()
        assert isinstance(socket.error, PoolTimeout)


async def test_a_thread_may_wait_in_vain_too(running: Running) -> None:
    """A `def` handler gets a 503 too."""
    if not isinstance(running.database, SyncDatabase):
        pytest.skip("async sessions need no thread")
    database = running.database

    def handler() -> None:
        with database.begin() as session:
            session.execute(text("SELECT 1"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await to_thread.run_sync(handler)

    async with exhausted(running):
        assert is_busy(await get(ours(app, running)))


async def test_together_with_attempts_each_has_its_own_waits(running: Running) -> None:
    """A conflict is retried; a time-out of the pool is not, and a handled time-out is forgotten."""
    if not running.real.is_postgresql:
        pytest.skip("only PostgreSQL can be told to fail with any SQLSTATE")
    lose = text("DO $$ BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '40001'; END $$")
    runs = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(scope["path"])
        if len(runs) == 1:
            async with exhausted(running):
                with pytest.raises(PoolTimeout):
                    await running.write("kept")
            await running.call("rollback")
            with pytest.raises(DBAPIError):
                await running.execute(lose)
        elif scope["path"] == "/wait":
            await running.write("kept")
        await respond(send, 500)

    assert (await get(ours(app, running, attempts=3))).status == 500
    assert runs == ["/", "/"]
    async with exhausted(running):
        assert is_busy(await get(ours(app, running, attempts=3), "/wait"))
    assert runs == ["/", "/", "/wait"]
    assert checked_out(running.database) == 0


async def test_the_page_says_what_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is equal, and routes without a database work."""
    page = Page("docs/how-to/overload.md")
    url = postgresql("tests")[0].render_as_string(hide_password=False)
    monkeypatch.setenv("DATABASE_URL", url)
    shop = page.run(0)
    database = shop["database"]
    async with database, AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(database.engine.connect())
        refused = await get(shop["app"], "/answer")
        (start, _) = refused.messages
        lines = ["HTTP/1.1 503 Service Unavailable"]
        lines += [f"{name.decode()}: {value.decode()}" for name, value in start["headers"]]
        assert refused.status == 503
        assert page.blocks("http") == ["\n".join(lines) + "\n"]
        assert (await get(shop["app"], "/health")).status == 200
        await stack.aclose()
        assert (await get(shop["app"], "/answer")).body == b"42"
