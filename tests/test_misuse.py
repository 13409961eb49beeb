"""Tests that common mistakes of newcomers give an error that says what to do."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import anyio.to_thread
import httpx2
import pytest
import strawberry
from asgi import Exchange, get, respond
from blacksheep import Application as BlackSheep
from blacksheep.server.routing import Router
from conftest import ENTRY, Running
from django.conf import empty, settings  # type: ignore[import-untyped]
from django.core.handlers.asgi import ASGIHandler  # type: ignore[import-untyped]
from django.http import HttpResponse  # type: ignore[import-untyped]
from django.urls import clear_url_caches, path  # type: ignore[import-untyped]
from falcon.asgi import App as Falcon
from fastapi import FastAPI
from litestar import Litestar, get as litestar_get
from quart import Quart
from sqlalchemy import create_engine, make_url, select, text
from sqlalchemy.exc import InvalidRequestError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from strawberry.asgi import GraphQL

from asgi_dbsession import (
    AsyncDatabase,
    ConcurrentUse,
    ConfigurationError,
    DatabaseNotRunning,
    DBSessionMiddleware,
    NoSession,
    SessionClosed,
    SyncDatabase,
    get_session,
    get_sync_session,
)

pytestmark = pytest.mark.anyio

Work = Callable[[], Awaitable[None]]
ASYNC = pytest.mark.parametrize("real", ["sqlite"], indirect=True)
BOTH = pytest.mark.parametrize("real", ["sqlite", "sqlite-sync"], indirect=True)


# One handler, in every framework


def bare_function(work: Work) -> Any:
    """No framework at all."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await work()
        await respond(send)

    return app


def starlette(work: Work) -> Any:
    async def handler(request: Request) -> Response:
        await work()
        return PlainTextResponse("ok")

    return Starlette(routes=[Route("/", handler)])


def fastapi(work: Work) -> Any:
    app = FastAPI()

    @app.get("/")
    async def handler() -> str:
        await work()
        return "ok"

    return app


def litestar(work: Work) -> Any:
    @litestar_get("/")
    async def handler() -> str:
        await work()
        return "ok"

    return Litestar([handler], logging_config=None)


def quart(work: Work) -> Any:
    app = Quart(__name__)

    @app.get("/")
    async def handler() -> str:
        await work()
        return "ok"

    return app


def falcon(work: Work) -> Any:
    class Resource:
        async def on_get(self, request: Any, response: Any) -> None:
            await work()

    app = Falcon()
    app.add_route("/", Resource())
    return app


def blacksheep(work: Work) -> Any:
    app: Any = BlackSheep(router=Router())  # the default registry is global

    async def handler() -> str:
        await work()
        return "ok"

    app.router.add_get("/", handler)

    async def served(scope: Any, receive: Any, send: Any) -> None:
        await app.start()  # starts the database as its lifespan would
        await app(scope, receive, send)
        await app.stop()

    return served


def django(work: Work) -> Any:
    async def view(request: Any) -> HttpResponse:
        await work()
        return HttpResponse("ok")

    urls: Any = ModuleType("urls")
    urls.urlpatterns = [path("", view)]

    async def served(scope: Any, receive: Any, send: Any) -> None:
        with django_settings(ROOT_URLCONF=urls, ALLOWED_HOSTS=["*"], SECRET_KEY="none"):
            await ASGIHandler()(scope, receive, send)

    return served


@contextmanager
def django_settings(**options: Any) -> Iterator[None]:
    """Change Django's settings for a moment: they are global, and other tests have their own."""
    lazy: Any = settings
    usual, lazy._wrapped = lazy._wrapped, empty
    clear_url_caches()
    try:
        settings.configure(**options)
        yield
    finally:
        lazy._wrapped = usual
        clear_url_caches()


FRAMEWORKS = {
    "Starlette": starlette,
    "FastAPI": fastapi,
    "Litestar": litestar,
    "Quart": quart,
    "Falcon": falcon,
    "BlackSheep": blacksheep,
    "Django": django,
    "a bare function": bare_function,
}
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)
in_the_table = pytest.mark.matrix("Misuse", "framework")


async def serve(framework: str, running: Running, work: Work) -> None:
    """Run a mistake in a handler, and check that the error has no other effects."""

    def hang_up_at_the_end(message: Any) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            exchange.hang_up.set()  # as servers do; Quart waits for it

    app = DBSessionMiddleware(FRAMEWORKS[framework](work), running.database)
    exchange = Exchange(app, on_message=hang_up_at_the_end)
    await exchange.run()
    assert (exchange.status, exchange.error) == (200, None)
    await running.assert_clean()


@ASYNC
@in_the_table
@frameworks
async def test_tasks_at_once_on_one_session_are_told(running: Running, framework: str) -> None:
    """Two tasks that use one session at once get `ConcurrentUse`; the response is still sent."""
    results: list[Any] = []

    async def work() -> None:
        at_once = (get_session().execute(select(ENTRY)) for _ in range(3))
        results.extend(await asyncio.gather(*at_once, return_exceptions=True))

    await serve(framework, running, work)
    errors = [each for each in results if isinstance(each, BaseException)]
    assert [type(each) for each in errors] == [ConcurrentUse] * 2
    assert "Open `database.begin()` in each task" in str(errors[0])


@BOTH
@in_the_table
@frameworks
async def test_threads_without_the_context_are_told(running: Running, framework: str) -> None:
    """A thread without the context of its request gets `NoSession`."""
    errors = []

    def in_thread() -> None:
        for accessor in (get_session, get_sync_session, running.database.get_session):
            cures = r"SyncDatabase, .* `asyncio\.to_thread`.* AsyncDatabase, .* `asyncio\.run_cor"
            with pytest.raises(NoSession, match=cures) as caught:
                accessor()
            errors.append(caught.value)

    async def work() -> None:
        await asyncio.get_running_loop().run_in_executor(None, in_thread)
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()

    await serve(framework, running, work)
    assert len(errors) == 6


async def test_a_def_handler_without_the_middleware_is_told_so() -> None:
    """Frameworks run it in a thread, but the thread has the context of its request."""
    for accessor in (get_session, get_sync_session):
        with pytest.raises(NoSession, match="no DBSessionMiddleware that serves"):
            await asyncio.to_thread(accessor)
        with pytest.raises(NoSession, match="no DBSessionMiddleware that serves"):
            await anyio.to_thread.run_sync(accessor)


@ASYNC
async def test_a_bare_thread_can_send_work_of_an_async_database_to_the_loop(
    running: Running,
) -> None:
    """The cure for an `AsyncDatabase`: the coroutine runs in the loop, in its own `begin()`."""
    database: Any = running.database

    async def store() -> None:
        async with database.begin() as session:
            await session.execute(ENTRY.insert().values(note="from a thread"))

    async def work() -> None:
        loop = asyncio.get_running_loop()

        def in_thread() -> None:
            asyncio.run_coroutine_threadsafe(store(), loop).result(timeout=10)

        await loop.run_in_executor(None, in_thread)

    await serve("Starlette", running, work)
    assert running.stored() == ["from a thread"]


@ASYNC
@in_the_table
@frameworks
async def test_a_task_that_outlives_its_request_is_told(running: Running, framework: str) -> None:
    """A task that outlives its request gets `SessionClosed`."""
    over = asyncio.Event()
    tasks = []

    async def late() -> None:
        session = get_session()
        await over.wait()
        await session.execute(select(ENTRY))

    async def work() -> None:
        tasks.append(asyncio.create_task(late()))
        await asyncio.sleep(0)

    await serve(framework, running, work)
    over.set()
    with pytest.raises(SessionClosed, match=r"open `database\.begin\(\)`"):
        await tasks[0]
    await running.assert_clean()


@ASYNC
@in_the_table
@frameworks
async def test_a_session_that_escaped_is_told(running: Running, framework: str) -> None:
    """A session that is used after its request raises `SessionClosed`, like `get_session()`."""
    escaped: list[AsyncSession] = []
    accessors = []

    async def work() -> None:
        escaped.append(get_session())

        async def ask_again() -> None:
            await over.wait()
            get_session()

        accessors.append(asyncio.create_task(ask_again()))
        await get_session().execute(select(ENTRY))

    over = asyncio.Event()
    await serve(framework, running, work)
    over.set()
    for use in (escaped[0].execute(select(ENTRY)), accessors[0]):
        with pytest.raises(SessionClosed, match=r"open `database\.begin\(\)`"):
            await use
    await running.assert_clean()


@BOTH
async def test_a_session_of_a_block_that_has_ended_is_told(running: Running) -> None:
    """A script has no request, so the error speaks of the block too."""
    told = r"The request or `begin\(\)` block .* has ended; .* open `database\.begin\(\)`"
    if isinstance(running.database, AsyncDatabase):
        async with running.database.begin() as session:
            pass
        with pytest.raises(SessionClosed, match=told):
            await session.execute(select(ENTRY))
    else:
        with running.database.begin() as blocking:
            pass
        with pytest.raises(SessionClosed, match=told):
            blocking.execute(select(ENTRY))
    await running.assert_clean()


# GraphQL


async def count() -> int:
    """Count rows with the session of the request, or of `begin()`."""
    return await get_session().scalar(text("SELECT 42")) or 0


@strawberry.type
class Query:
    """Fields that GraphQL resolves at the same time."""

    @strawberry.field
    async def shared(self) -> int | None:
        """Count with the session of the request."""
        return await count()

    @strawberry.field
    async def required(self) -> int:
        """Count with the session of the request; an error fails the whole query."""
        return await count()

    @strawberry.field
    async def own(self, info: strawberry.Info) -> int:
        """Count with a new session."""
        async with info.context["request"].scope["database"].begin():
            return await count()


@ASYNC
async def test_resolvers_at_once_are_told_and_begin_is_their_cure(running: Running) -> None:
    """Fields of a query run in parallel: all fields but the first get the error."""
    graphql: Any = GraphQL(strawberry.Schema(Query))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await graphql(scope | {"database": running.database}, receive, send)

    transport = httpx2.ASGITransport(app=cast("Any", DBSessionMiddleware(app, running.database)))
    async with httpx2.AsyncClient(transport=transport) as client:

        async def ask(query: str) -> Any:
            return (await client.post("http://test/", json={"query": query})).json()

        answer = await ask("{ one: shared two: shared }")
        assert answer["data"] == {"one": 42, "two": None}
        assert "Open `database.begin()` in each task" in answer["errors"][0]["message"]
        answer = await ask("{ one: own two: own }")
        assert answer["data"] == {"one": 42, "two": 42}
        # GraphQL cancels a statement whose result is not needed any more, and so its transaction.
        with pytest.raises(PendingRollbackError):
            await ask("{ one: required two: required }")
        await running.assert_clean()
        assert (await ask("{ required }"))["data"] == {"required": 42}
    await running.assert_clean()


# Event loops and lifespans


async def answer(request: Request) -> Response:
    """Return a row of the database."""
    return PlainTextResponse(str(await get_session().scalar(text("SELECT 42"))))


def application(database: Any) -> Starlette:
    """A small application."""
    app = Starlette(routes=[Route("/", answer)])
    app.add_middleware(DBSessionMiddleware, database)
    return app


@ASYNC
def test_a_test_client_without_with_is_told(real: Any) -> None:
    """The client sends no lifespan; `with TestClient(app):` sends one."""
    app = application(real.describe())
    with pytest.raises(DatabaseNotRunning, match=r"`with TestClient\(app\):`"):
        TestClient(app).get("/")
    with TestClient(app) as client:
        assert client.get("/").text == "42"


@ASYNC
async def test_httpx_without_a_lifespan_is_told(real: Any) -> None:
    """`ASGITransport` sends no lifespan; `async with database:` around it is sufficient."""
    database = real.describe()
    transport = httpx2.ASGITransport(app=cast("Any", application(database)))
    async with httpx2.AsyncClient(transport=transport) as client:
        cures = (
            r"`LifespanManager` around httpx's `ASGITransport`\. In a test or a script, you can "
            "also write `async with database:`"
        )
        with pytest.raises(DatabaseNotRunning, match=cures):
            await client.get("http://test/")
        async with database:
            assert (await client.get("http://test/")).text == "42"


@ASYNC
async def test_a_test_client_in_an_async_test_is_told(running: Running) -> None:
    """The client has its own event loop, with or without `with`."""
    app = application(running.database)
    cure = r"In an async test use httpx's `ASGITransport`"
    with pytest.raises(DatabaseNotRunning, match=cure):
        TestClient(app).get("/")
    with pytest.raises(DatabaseNotRunning, match=cure), TestClient(app):
        pytest.fail("it went on")


# Wrong time and wrong use


@BOTH
def test_a_session_is_not_to_be_had_at_import(real: Any) -> None:
    """No request exists yet, so the call belongs into a function."""
    for accessor in (get_session, get_sync_session, real.describe().get_session):
        with pytest.raises(NoSession, match=r"Outside of a request, use `database\.begin\(\)`"):
            accessor()


@ASYNC
async def test_another_database_than_that_of_the_middleware_is_told(running: Running) -> None:
    """Two objects for one file are two databases: the middleware compares objects, not URLs."""
    twin = running.real.describe()
    errors = []

    async def work() -> None:
        with pytest.raises(NoSession, match="this same database") as caught:
            twin.get_session()
        errors.append(caught.value)

    await serve("Starlette", running, work)
    assert errors


@ASYNC
async def test_a_block_of_session_begin_is_sqlalchemys_own_affair(running: Running) -> None:
    """The block commits at its end; it is refused once the session has begun a transaction."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = get_session()
        async with session.begin():
            await session.execute(ENTRY.insert().values(note="committed by the block"))
        await session.execute(ENTRY.insert().values(note="rolled back"))
        with pytest.raises(InvalidRequestError, match="already begun"):
            session.begin()
            await session.begin()
        await respond(send, 400)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (400, None)
    assert running.stored() == ["committed by the block"]


@ASYNC
async def test_an_async_session_in_a_thread_is_told(running: Running) -> None:
    """`add` needs no `await`, so only its error can say that this does not work."""
    app = FastAPI()

    @app.get("/")
    def handler() -> None:
        get_session().add(object())

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert isinstance(exchange.error, ConfigurationError)
    assert "`async def`" in str(exchange.error)
    assert "SyncDatabase" in str(exchange.error)


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application."""


URL = "sqlite+aiosqlite://"
SYNC_URL = "sqlite+pysqlite://"
# Mistakes in arguments, and what the error says to write.
MISTAKES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an async engine": (
        lambda any_: DBSessionMiddleware(nothing, any_(create_async_engine(URL))),
        r"Write `AsyncDatabase\.from_engine\(engine\)`\.$",
    ),
    "a sync engine": (
        lambda any_: DBSessionMiddleware(nothing, any_(create_engine(SYNC_URL))),
        r"Write `SyncDatabase\.from_engine\(engine\)`\.$",
    ),
    "a factory of async sessions": (
        lambda any_: DBSessionMiddleware(nothing, any_(async_sessionmaker())),
        r"takes a URL, an AsyncDatabase or a SyncDatabase, not something of type \w+\.$",
    ),
    "a factory of sessions": (
        lambda any_: DBSessionMiddleware(nothing, any_(sessionmaker())),
        r"takes a URL, an AsyncDatabase or a SyncDatabase, not something of type \w+\.$",
    ),
    "no URL at all": (
        lambda any_: DBSessionMiddleware(nothing, any_(None)),
        r"takes a URL, an AsyncDatabase or a SyncDatabase, not something of type NoneType\.$",
    ),
    "the class for a database": (
        lambda any_: DBSessionMiddleware(nothing, any_(AsyncDatabase)),
        r"takes a URL, an AsyncDatabase or a SyncDatabase, not the class AsyncDatabase\.$",
    ),
    "the application and the URL interchanged": (
        lambda any_: DBSessionMiddleware(any_(URL), any_(nothing)),
        r"Give it the application first",
    ),
    "a variable that is not set": (
        lambda any_: AsyncDatabase(any_(None)),
        r"Write `dialect://user:password@host:port/name`",
    ),
    "an engine for a URL": (
        lambda any_: AsyncDatabase(any_(create_async_engine(URL))),
        r"Write `AsyncDatabase\.from_engine\(engine\)`",
    ),
    "an engine of the other kind": (
        lambda any_: AsyncDatabase.from_engine(any_(create_engine(SYNC_URL))),
        r"takes an AsyncEngine, .* Engine\. Write `SyncDatabase\.from_engine\(engine\)`\.$",
    ),
    "an async engine of the other kind": (
        lambda any_: SyncDatabase.from_engine(any_(create_async_engine(URL))),
        r"takes an Engine, .* AsyncEngine\. Write `AsyncDatabase\.from_engine\(engine\)`\.$",
    ),
    "a URL for an engine": (
        lambda any_: SyncDatabase.from_engine(any_(URL)),
        r"from_engine takes an Engine, not something of type str\. Write `SyncDatabase\(url\)`\.$",
    ),
    "a parsed URL for an engine": (
        lambda any_: AsyncDatabase.from_engine(any_(make_url(URL))),
        r"takes an AsyncEngine, not something of type URL\. Write `AsyncDatabase\(url\)`\.$",
    ),
    "a factory for an engine": (
        lambda any_: AsyncDatabase.from_engine(any_(async_sessionmaker())),
        r"from_engine takes an AsyncEngine, not something of type async_sessionmaker\.$",
    ),
    "a driver that blocks": (lambda any_: AsyncDatabase(SYNC_URL), r"or a SyncDatabase"),
    "a driver for asyncio": (lambda any_: SyncDatabase(URL), r"or use an AsyncDatabase"),
    "a session class of the other kind": (
        lambda any_: SyncDatabase(SYNC_URL, session_options={"class_": any_(AsyncSession)}),
        r"takes a subclass of Session",
    ),
    "a coroutine function for commit_when": (
        lambda any_: DBSessionMiddleware(nothing, URL, commit_when=any_(nothing)),
        r"commit_when takes a plain function",
    ),
    "a status for commit_when": (
        lambda any_: DBSessionMiddleware(nothing, URL, commit_when=any_(200)),
        r"commit_when takes a plain function",
    ),
    "a response for on_commit_error": (
        lambda any_: DBSessionMiddleware(nothing, URL, on_commit_error=any_("sorry")),
        r"on_commit_error takes a plain function",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_argument_is_told_what_to_write(mistake: str) -> None:
    """The error is raised when the application is built, not at its first request."""
    make, cure = MISTAKES[mistake]
    with pytest.raises(ConfigurationError, match=cure):
        make(lambda value: value)
