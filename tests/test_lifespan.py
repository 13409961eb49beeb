"""Tests when databases are started and stopped."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from asgi import Life, get, respond
from conftest import ENTRY, AnyDatabase, Real, Running, becomes_true
from sqlalchemy.pool import QueuePool
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DatabaseUnavailable,
    DBSessionMiddleware,
    NoSession,
    SyncDatabase,
)
from asgi_dbsession.asgi.lifespan import serve_lifespan

pytestmark = pytest.mark.anyio

COMPLETE = {"type": "lifespan.startup.complete"}
STOPPED = {"type": "lifespan.shutdown.complete"}


class Part:
    """Another object with a startup and a shutdown, which records the calls."""

    def __init__(self, name: str, told: list[str], *, fails: bool = False) -> None:
        self._name = name
        self._told = told
        self._fails = fails

    async def startup(self) -> None:
        """Start."""
        self._told.append(f"{self._name} started")

    async def shutdown(self) -> None:
        """Stop slowly."""
        await asyncio.sleep(0)
        if self._fails:
            raise OSError(f"{self._name} is\nstuck")
        self._told.append(f"{self._name} stopped")


def store(database: AnyDatabase, note: str) -> Any:
    """Store a row in a unit of work of its own."""

    async def store_it() -> None:
        insert = ENTRY.insert().values(note=note)
        if isinstance(database, SyncDatabase):
            with database.begin() as session:
                session.execute(insert)
        else:
            async with database.begin() as session:
                await session.execute(insert)

    return store_it()


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """Answer the startup and the shutdown, and do nothing else."""
    await receive()
    await send(COMPLETE)
    await receive()
    await send(STOPPED)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A TCP port that refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A TCP port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def is_connecting(database: AnyDatabase) -> bool:
    """Return True if the pool waits for a connection."""
    pool: Any = database.engine.pool
    return bool(pool.checkedout())


def sqlite(path: Any) -> AsyncDatabase:
    """A database that always answers."""
    return AsyncDatabase(f"sqlite+aiosqlite:///{path / 'here.db'}")


async def test_the_engine_runs_around_the_applications_own_startup_and_shutdown(real: Real) -> None:
    """Both phases can use the database, which is stopped before the server gets the answer."""
    database = real.describe()
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive(), real.stored()))
        await store(database, "at startup")
        await send(COMPLETE)
        seen.append((await receive(), real.stored()))
        await store(database, "at shutdown")
        await send(STOPPED)

    life = Life(
        DBSessionMiddleware(app, database),
        on_message=lambda message: seen.append((message, real.stored(), database.is_running)),
    )
    await life.run()
    assert life.error is None
    assert seen == [
        ({"type": "lifespan.startup"}, []),
        (COMPLETE, ["at startup"], True),
        ({"type": "lifespan.shutdown"}, ["at startup"]),
        (STOPPED, ["at startup", "at shutdown"], False),
    ]


async def test_no_connection_outlives_the_lifespan(real: Real) -> None:
    """All connections are closed before the server gets the answer to the shutdown."""
    if not real.is_postgresql:
        pytest.skip("there is no server to be left")
    database = real.describe()
    connections = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await store(database, "kept")
        connections.append(real.connections())
        await send(COMPLETE)
        await receive()
        await send(STOPPED)

    life = Life(DBSessionMiddleware(app, database))
    await life.run()
    assert life.messages == [COMPLETE, STOPPED]
    assert connections == [1]
    await becomes_true(lambda: real.connections() == 0)


async def test_the_application_gets_the_lifespan_as_the_server_sent_it(tmp_path: Any) -> None:
    """The scope, with the server's `state` in it, is passed on unchanged."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        await nothing(scope, receive, send)

    life = await Life(DBSessionMiddleware(app, sqlite(tmp_path))).run()
    assert seen[0] is life.scope


@pytest.mark.parametrize("raises", [False, True])
async def test_an_application_that_fails_its_startup_finds_the_engine_stopped(
    real: Real, raises: bool
) -> None:
    """Its message and its exception reach the server after the database was stopped."""
    database = real.describe()
    seen = []
    failed = {"type": "lifespan.startup.failed", "message": "no coffee"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await store(database, "kept")
        await send(failed)
        if raises:
            raise LookupError("no coffee")

    life = Life(
        DBSessionMiddleware(app, database),
        on_message=lambda message: seen.append((message, database.is_running)),
    )
    await life.startup()
    await asyncio.wait([life.task])
    assert seen == [(failed, False)]
    assert isinstance(life.error, LookupError) == raises
    assert real.stored() == ["kept"]


async def test_starlettes_way_to_fail_the_startup_is_forwarded(tmp_path: Any) -> None:
    """Its traceback is the message, and its exception still reaches the server."""
    database = sqlite(tmp_path)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        raise LookupError("no coffee")
        yield

    life = Life(DBSessionMiddleware(Starlette(lifespan=lifespan), database))
    await life.startup()
    await asyncio.wait([life.task])
    (message,) = life.messages
    assert message["type"] == "lifespan.startup.failed"
    assert "no coffee" in message["message"]
    assert isinstance(life.error, LookupError)
    assert not database.is_running


@pytest.mark.parametrize("raises", [False, True])
async def test_an_application_that_fails_its_shutdown_finds_the_engine_stopped(
    real: Real, raises: bool
) -> None:
    """Its own message reaches the server after the database was stopped."""
    database = real.describe()
    seen = []
    failed = {"type": "lifespan.shutdown.failed", "message": "too late"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(COMPLETE)
        await receive()
        await send(failed)
        if raises:
            raise LookupError("too late")

    life = Life(
        DBSessionMiddleware(app, database),
        on_message=lambda message: seen.append((message, database.is_running)),
    )
    await life.run()
    assert seen == [(COMPLETE, True), (failed, False)]
    assert isinstance(life.error, LookupError) == raises


@pytest.mark.parametrize(
    ("database_class", "driver"),
    [(AsyncDatabase, "asyncpg"), (AsyncDatabase, "psycopg"), (SyncDatabase, "psycopg")],
)
async def test_a_database_that_cannot_be_reached_fails_the_startup_with_one_line(
    tmp_path: Any, closed_port: int, database_class: type[AnyDatabase], driver: str
) -> None:
    """The application is not called, no password is shown, and started databases are stopped."""
    first = sqlite(tmp_path)
    second = database_class(f"postgresql+{driver}://app:hush%40hush@127.0.0.1:{closed_port}/shop")
    last = sqlite(tmp_path)
    running = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        pytest.fail("the application was called")

    tasks, threads = asyncio.all_tasks(), threading.active_count()
    life = Life(
        DBSessionMiddleware(app, first, second, last),
        on_message=lambda _: running.extend([first.is_running, second.is_running, last.is_running]),
    )
    await life.startup()
    await asyncio.wait([life.task])
    assert isinstance(life.error, DatabaseUnavailable)
    (message,) = life.messages
    assert message["type"] == "lifespan.startup.failed"
    assert "127.0.0.1" in message["message"]
    assert message["message"].endswith(
        "Is it running, and are host, port, name, user and password right?"
    )
    assert "\n" not in message["message"]
    assert "hush" not in message["message"]
    assert running == [False, False, False]
    assert asyncio.all_tasks() == tasks
    if database_class is AsyncDatabase:  # a thread of the thread pool stays for later use
        await becomes_true(lambda: threading.active_count() <= threads)


async def test_a_database_that_never_answers_fails_the_startup_in_the_drivers_time(
    silent_port: int,
) -> None:
    """The connect timeout of the driver limits the startup too."""
    database = AsyncDatabase(
        f"postgresql+asyncpg://app@127.0.0.1:{silent_port}/shop", connect_args={"timeout": 0.1}
    )
    life = Life(DBSessionMiddleware(nothing, database))
    async with asyncio.timeout(5):
        await life.startup()
    (message,) = life.messages
    assert message["type"] == "lifespan.startup.failed"
    assert "TimeoutError" in message["message"]


async def test_without_a_ping_the_server_starts_before_the_database_does(closed_port: int) -> None:
    """With `ping_on_startup=False`, the first request gets the error."""
    database = AsyncDatabase(
        f"postgresql+asyncpg://app@127.0.0.1:{closed_port}/shop", ping_on_startup=False
    )
    life = await Life(DBSessionMiddleware(nothing, database)).run()
    assert life.messages == [COMPLETE, STOPPED]


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"nonsense": 1, "more": 2}, "nonsense"),
        ({"poolclass": QueuePool}, "QueuePool"),
    ],
)
async def test_engine_options_that_are_refused_fail_the_startup_with_one_line(
    tmp_path: Any, options: dict[str, Any], fact: str
) -> None:
    """The server gets SQLAlchemy's reason in one line; the application is not called."""
    first = sqlite(tmp_path)
    second = AsyncDatabase("postgresql+asyncpg://app:hush@localhost/shop", **options)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        pytest.fail("the application was called")

    life = Life(DBSessionMiddleware(app, first, second))
    await life.startup()
    await asyncio.wait([life.task])
    assert isinstance(life.error, ConfigurationError)
    (message,) = life.messages
    assert message["type"] == "lifespan.startup.failed"
    assert "cannot be built with these engine options" in message["message"]
    assert fact in message["message"]
    assert "\n" not in message["message"]
    assert "hush" not in message["message"]
    assert not first.is_running
    assert not second.is_running


@pytest.mark.parametrize("given", [(), ("shop",), ("sqlite:///shop.db", "sqlite+nonsense://")])
async def test_a_url_that_cannot_work_fails_the_startup_and_each_request(
    given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starlette makes its middleware during the lifespan, where servers hide an exception."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    app = Starlette()
    app.add_middleware(DBSessionMiddleware, *given, attempts=2, on_report=print)
    life = Life(app)
    await life.startup()
    await asyncio.wait([life.task])
    (message,) = life.messages
    assert message["type"] == "lifespan.startup.failed"
    assert isinstance(life.error, ConfigurationError)
    assert message["message"] == str(life.error)
    for _ in range(2):
        exchange = await get(app)
        assert exchange.status == 500
        assert isinstance(exchange.error, ConfigurationError)
        assert str(exchange.error) == str(life.error)


def test_a_test_client_hears_of_a_startup_that_failed(closed_port: int) -> None:
    """The middleware raises the error, because a test client would otherwise wait forever."""
    app = Starlette()
    app.add_middleware(
        DBSessionMiddleware, f"postgresql+asyncpg://app@127.0.0.1:{closed_port}/shop"
    )
    with pytest.raises(DatabaseUnavailable, match="Is it running"), TestClient(app):
        pytest.fail("it went on")


async def test_a_startup_that_fails_in_no_way_of_ours_shows_where_it_came_from() -> None:
    """The server gets one line, and the exception itself."""
    told: list[str] = []

    class Broken(Part):
        async def startup(self) -> None:
            raise LookupError("no\ncoffee")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await serve_lifespan(
            nothing, [Part("one", told), Broken("two", told)], scope, receive, send
        )

    life = Life(app)
    await life.startup()
    await asyncio.wait([life.task])
    assert life.messages == [
        {"type": "lifespan.startup.failed", "message": "LookupError: no coffee"}
    ]
    assert isinstance(life.error, LookupError)
    assert told == ["one started", "one stopped"]


@pytest.mark.parametrize("way", ["raises", "returns", "asks and returns"])
async def test_an_application_that_ignores_the_lifespan_is_served_all_the_same(
    real: Real, way: str
) -> None:
    """The middleware answers for the application, which can use the database until the shutdown."""
    database = real.describe()
    running = Running(real, database)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            if way == "asks and returns":
                await receive()
            if way == "raises":
                raise AssertionError("I speak HTTP")
            return
        await running.write("kept")
        await respond(send)

    middleware = DBSessionMiddleware(app, database)
    life = await Life(middleware).startup()
    assert life.messages == [COMPLETE]
    assert (await get(middleware)).status == 200
    await life.shutdown()
    assert life.error is None
    assert life.messages == [COMPLETE, STOPPED]
    assert real.stored() == ["kept"]
    assert not database.is_running


@pytest.mark.parametrize("catches", [False, True])
async def test_an_application_that_answers_the_lifespan_with_http_is_served(
    real: Real, catches: bool
) -> None:
    """It does not look at the type of the scope. The server would wait for its startup forever."""
    database = real.describe()
    running = Running(real, database)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await running.write("kept")
        except NoSession:
            assert scope["type"] == "lifespan"
        try:
            await respond(send)
        except ConfigurationError:
            if not catches:
                raise

    middleware = DBSessionMiddleware(app, database)
    life = await Life(middleware).startup()
    assert life.messages == [COMPLETE]
    assert (await get(middleware)).status == 200
    await life.shutdown()
    assert life.error is None
    assert life.messages == [COMPLETE, STOPPED]
    assert real.stored() == ["kept"]


async def test_an_application_that_takes_the_startup_for_a_request_does_not_start(
    real: Real, caplog: pytest.LogCaptureFixture
) -> None:
    """The error names the line to write."""
    database = real.describe()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()  # meant for the body
        await respond(send)

    life = await Life(DBSessionMiddleware(app, database)).startup()
    await asyncio.wait([life.task])
    (message,) = life.messages
    assert message["type"] == "lifespan.startup.failed"
    assert """`assert scope["type"] == "http"`""" in message["message"]
    assert isinstance(life.error, ConfigurationError)
    assert "http.response.start" in caplog.text
    assert not database.is_running


@pytest.mark.parametrize("nested", [False, True])
async def test_an_application_that_raises_in_its_startup_has_failed(
    real: Real, nested: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The server gets the failure, the log has the traceback, and the databases are stopped."""
    database = real.describe()
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await store(database, "kept")
        raise LookupError("no\ncoffee")

    middleware = DBSessionMiddleware(app, database)
    life = Life(
        DBSessionMiddleware(middleware, database) if nested else middleware,
        on_message=lambda message: seen.append((message, database.is_running)),
    )
    await life.startup()
    await asyncio.wait([life.task])
    failed = {"type": "lifespan.startup.failed", "message": "LookupError: no coffee"}
    assert seen == [(failed, False)]
    assert not database.is_running
    assert isinstance(life.error, LookupError)
    (record,) = [each for each in caplog.records if each.name == "asgi_dbsession"]
    assert record.exc_info
    assert real.stored() == ["kept"]


async def test_an_application_that_crashes_after_its_startup_is_served_until_the_shutdown(
    real: Real,
) -> None:
    """Requests continue; the error reaches the server at the end, instead of an answer."""
    database = real.describe()
    running = Running(real, database)
    crash = LookupError("no coffee")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send(COMPLETE)
            raise crash
        await running.write("kept")
        await respond(send)

    middleware = DBSessionMiddleware(app, database)
    life = await Life(middleware).startup()
    assert (await get(middleware)).status == 200
    assert database.is_running
    await life.shutdown()
    assert life.error is crash
    assert life.messages == [COMPLETE]
    assert real.stored() == ["kept"]
    assert not database.is_running


@pytest.mark.parametrize("raises", [False, True])
async def test_an_application_that_never_answers_the_shutdown_does_not_keep_the_engine(
    tmp_path: Any, raises: bool
) -> None:
    """After a return the middleware answers; after an exception the server gets the failure."""
    database = sqlite(tmp_path)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(COMPLETE)
        await receive()
        if raises:
            raise LookupError

    life = await Life(DBSessionMiddleware(app, database)).run()
    assert life.messages == ([COMPLETE] if raises else [COMPLETE, STOPPED])
    assert isinstance(life.error, LookupError) == raises
    assert not database.is_running


@pytest.mark.parametrize("fails", [0, 1, 2])
async def test_each_database_is_stopped_although_another_one_fails(
    fails: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Databases stop in reverse order; the server and the log get the failure."""
    told: list[str] = []
    parts = [Part(f"part {number}", told, fails=number == fails) for number in range(3)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await serve_lifespan(nothing, parts, scope, receive, send)

    life = await Life(app).run()
    assert life.messages == [
        COMPLETE,
        {"type": "lifespan.shutdown.failed", "message": f"OSError: part {fails} is stuck"},
    ]
    assert told == [
        *(f"part {number} started" for number in (0, 1, 2)),
        *(f"part {number} stopped" for number in (2, 1, 0) if number != fails),
    ]
    (record,) = [each for each in caplog.records if each.name == "asgi_dbsession"]
    assert record.exc_info


async def test_the_applications_own_failure_is_told_before_that_of_a_database() -> None:
    """The server gets the message of the application; the log has the other error."""
    told: list[str] = []
    failed = {"type": "lifespan.shutdown.failed", "message": "too late"}

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(COMPLETE)
        await receive()
        await send(failed)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await serve_lifespan(broken, [Part("one", told, fails=True)], scope, receive, send)

    assert (await Life(app).run()).messages == [COMPLETE, failed]


async def test_what_a_server_makes_of_a_failed_startup_is_not_mixed_up_with_it(
    closed_port: int,
) -> None:
    """Hypercorn raises at the message, and its traceback does not contain the driver's error."""

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def raise_message(message: Any) -> None:
        raise LookupError(message["message"])

    database = AsyncDatabase(f"postgresql+asyncpg://app@127.0.0.1:{closed_port}/shop")
    middleware = DBSessionMiddleware(nothing, database)
    with pytest.raises(LookupError, match="cannot be reached") as caught:
        await middleware({"type": "lifespan"}, receive, raise_message)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("phase", ["startup", "requests", "shutdown"])
async def test_a_lifespan_that_is_cancelled_stops_its_engines(real: Real, phase: str) -> None:
    """The server may cancel during the startup of the application, while waiting, or later."""
    first, second = real.describe(), real.describe()
    waiting = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if phase == "startup":
            waiting.set()
            await asyncio.Event().wait()
        await send(COMPLETE)
        if phase == "requests":
            waiting.set()
        await receive()
        waiting.set()
        await asyncio.Event().wait()

    life = Life(DBSessionMiddleware(app, first, second))
    asking = asyncio.create_task(life.run() if phase == "shutdown" else life.startup())
    await waiting.wait()
    assert first.is_running
    assert second.is_running
    life.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await life.task
    await asking
    assert life.messages == ([] if phase == "startup" else [COMPLETE])
    assert not first.is_running
    assert not second.is_running
    if real.is_postgresql:
        await becomes_true(lambda: real.connections() == 0)


@pytest.mark.parametrize("cancellations", [1, 2, 3])
async def test_a_lifespan_that_is_cancelled_while_it_stops_stops_everything(
    cancellations: int,
) -> None:
    """A server that cancels twice leaves nothing running."""
    told: list[str] = []

    class Slow(Part):
        async def shutdown(self) -> None:
            if len(told) < 3 + cancellations:
                life.task.cancel()
            try:
                await super().shutdown()
            except asyncio.CancelledError:
                # Used as a database that stops and then raises.
                told.append(f"{self._name} stopped")
                raise

    parts = [Slow(f"part {number}", told) for number in range(3)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await serve_lifespan(nothing, parts, scope, receive, send)

    life = Life(app)
    await life.run()
    assert life.task.cancelled()
    assert told == [
        *(f"part {number} started" for number in (0, 1, 2)),
        *(f"part {number} stopped" for number in (2, 1, 0)),
    ]


async def test_a_startup_that_is_cancelled_while_it_connects_leaves_nothing_running(
    tmp_path: Any,
) -> None:
    """A server that is stopped while it waits for its database stops at once."""
    first = sqlite(tmp_path)
    tasks = asyncio.all_tasks()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        second = AsyncDatabase(f"postgresql+asyncpg://app@127.0.0.1:{port}/shop")
        life = Life(DBSessionMiddleware(nothing, first, second))
        asking = asyncio.create_task(life.startup())
        # The driver waits for an answer to its first message, which is not sent. A driver that is
        # cancelled earlier leaves a future whose exception nobody retrieves.
        with (await asyncio.to_thread(listening.accept))[0] as accepted:
            assert await asyncio.to_thread(accepted.recv, 8)
            assert is_connecting(second)
            life.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await life.task
    await asking
    assert life.messages == []
    assert not first.is_running
    assert not second.is_running
    assert asyncio.all_tasks() == tasks


async def test_a_middleware_around_another_one_shares_its_database(real: Real) -> None:
    """The database is started by both, and stopped once, by the outer middleware at its end."""
    database = real.describe()
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(database.engine)
        await nothing(scope, receive, send)

    async def between(scope: Any, receive: Any, send: Any) -> None:
        async def look_then_send(message: Any) -> None:
            seen.append((message, database.engine is seen[0]))
            await send(message)

        await DBSessionMiddleware(app, database)(scope, receive, look_then_send)

    life = await Life(DBSessionMiddleware(between, database)).run()
    assert seen[1:] == [(COMPLETE, True), (STOPPED, True)]
    assert life.messages == [COMPLETE, STOPPED]
    assert not database.is_running


async def test_an_application_can_live_again(real: Real) -> None:
    """A second lifespan, as in a test suite, gets a new engine."""
    database = real.describe()
    engines: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await store(database, f"life {len(engines)}")
        engines.append(database.engine)
        await nothing(scope, receive, send)

    for _ in range(2):
        assert (await Life(DBSessionMiddleware(app, database)).run()).messages == [
            COMPLETE,
            STOPPED,
        ]
    assert engines[0] is not engines[1]
    assert real.stored() == ["life 0", "life 1"]


def test_a_starlette_application_has_its_database_in_its_lifespan_and_its_requests(
    real: Real,
) -> None:
    """`with TestClient(app)` is sufficient for tests."""
    database = real.describe()
    running = Running(real, database)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await store(database, "at startup")
        yield
        await store(database, "at shutdown")

    async def handler(_request: Request) -> PlainTextResponse:
        await running.write("in a request")
        return PlainTextResponse("ok")

    app = Starlette(
        lifespan=lifespan,
        routes=[Route("/", handler)],
        middleware=[Middleware(DBSessionMiddleware, database)],
    )
    with TestClient(app) as client:
        assert client.get("/").text == "ok"
        assert real.stored() == ["at startup", "in a request"]
    assert real.stored() == ["at startup", "in a request", "at shutdown"]
    assert not database.is_running
    if real.is_postgresql:
        asyncio.run(becomes_true(lambda: real.connections() == 0))


async def test_a_lifespan_of_an_engine_that_is_not_ours_leaves_it_running(real: Real) -> None:
    """The application that made the engine disposes it."""
    async with real.describe() as owner:
        kind: Any = type(owner)
        database = kind.from_engine(owner.engine)
        await Life(DBSessionMiddleware(nothing, database)).run()
        assert database.is_running
        await store(database, "kept")
    assert real.stored() == ["kept"]
