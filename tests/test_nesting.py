"""Tests the middleware together with other middleware, sub-applications, routes, and twice."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from asgi import Exchange, get
from conftest import ENTRY, Running
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.testclient import TestClient

from asgi_dbsession import (
    AsyncDatabase,
    DatabaseNotRunning,
    DBSessionMiddleware,
    NoSession,
    get_session,
    set_rollback,
)

pytestmark = pytest.mark.anyio

ASYNC = pytest.mark.parametrize("real", ["sqlite"], indirect=True)
BOTH = pytest.mark.parametrize("real", ["sqlite", "sqlite-sync"], indirect=True)
PLACES = pytest.mark.parametrize("place", ["inside", "outside"])

Next = Callable[[Request], Awaitable[Response]]


async def pass_on(request: Request, call_next: Next) -> Response:
    """The smallest `@app.middleware("http")`."""
    return await call_next(request)


OTHERS = {
    "BaseHTTPMiddleware": Middleware(BaseHTTPMiddleware, dispatch=pass_on),
    "GZipMiddleware": Middleware(GZipMiddleware, minimum_size=1),
    "CORSMiddleware": Middleware(CORSMiddleware, allow_origins=["https://shop.test"]),
}


def taken(error: Exception) -> Response:
    """Return the response to a failed COMMIT."""
    return PlainTextResponse("taken", status_code=409)


def ours(*databases: Any, **options: Any) -> Middleware:
    """Return our middleware in the form in which an application lists it."""
    return Middleware(DBSessionMiddleware, *databases, **options)


async def serve(request: Request) -> Response:
    """Store the path as a note, and then do what the path says."""
    running: Running = request.app.state.running
    what = request.path_params["what"]
    await running.write(what)
    if what == "doomed":
        await running.doom()
    if what == "failing":
        raise LookupError(what)
    if what == "streamed":
        return StreamingResponse(parts(running))
    if what == "background":
        return PlainTextResponse(what, background=BackgroundTask(running.write, "afterwards"))
    return PlainTextResponse(what * 100, status_code=404 if what == "missing" else 201)


async def parts(running: Running) -> AsyncIterator[bytes]:
    """A body that stores each part that it sends."""
    yield b"first"
    await running.write("in the body")
    yield b"last"


def starlette_on(
    running: Running, *middleware: Middleware, routes: list[BaseRoute] | None = None, **options: Any
) -> Starlette:
    """An application that stores the path of each request."""
    app = Starlette(routes=routes or [Route("/{what}", serve)], middleware=middleware, **options)
    app.state.running = running
    return app


# Other middleware


@BOTH
@PLACES
@pytest.mark.parametrize("other", OTHERS)
async def test_the_promises_hold_inside_and_outside_of_other_middleware(
    running: Running, other: str, place: str
) -> None:
    """Work is stored before the start, or rolled back; a failed COMMIT gets one response."""
    middleware = [ours(running.database, on_commit_error=taken), OTHERS[other]]
    app = starlette_on(running, *(middleware if place == "inside" else reversed(middleware)))
    stored_at: list[list[str]] = []
    exchange = await get(app, "/kept", on_message=lambda _: stored_at.append(running.stored()))
    assert (exchange.status, exchange.error) == (201, None)
    assert {tuple(each) for each in stored_at} == {("kept",)}
    assert (await get(app, "/missing")).status == 404
    assert isinstance((await get(app, "/failing")).error, LookupError)
    exchange = await get(app, "/doomed")
    assert (exchange.status, exchange.body, exchange.error) == (409, b"taken", None)
    assert running.stored() == ["kept"]


@ASYNC
@PLACES
@pytest.mark.parametrize("other", OTHERS)
async def test_bodies_and_background_tasks_work_inside_and_outside_of_other_middleware(
    running: Running, other: str, place: str
) -> None:
    """Body and background task are one unit each, stored when the application has returned."""
    middleware = [ours(running.database), OTHERS[other]]
    app = starlette_on(running, *(middleware if place == "inside" else reversed(middleware)))
    for path in ("/streamed", "/background"):
        exchange = await get(app, path)
        assert (exchange.status, exchange.error) == (200, None)
    assert running.stored() == ["streamed", "in the body", "background", "afterwards"]


@BOTH
async def test_an_inner_http_middleware_has_the_session_of_the_handler(running: Running) -> None:
    """The middleware sees the session before and after `call_next`, which runs another task."""
    sessions = []

    async def audit(request: Request, call_next: Next) -> Response:
        sessions.append(running.database.get_session())
        await running.write("before")
        response = await call_next(request)
        await running.write("after")
        return response

    async def handler(request: Request) -> Response:
        sessions.append(running.database.get_session())
        await running.write("handler")
        return PlainTextResponse("ok")

    inner = Middleware(BaseHTTPMiddleware, dispatch=audit)
    app = starlette_on(running, ours(running.database), inner, routes=[Route("/", handler)])
    stored_at: list[list[str]] = []
    await get(app, on_message=lambda _: stored_at.append(running.stored()))
    assert sessions[0] is sessions[1]
    assert stored_at[0] == ["before", "handler", "after"]


@BOTH
@pytest.mark.parametrize(("inner", "outcome"), [(404, []), (200, ["kept"])])
async def test_the_status_that_leaves_our_middleware_is_the_one_that_counts(
    running: Running, inner: int, outcome: list[str]
) -> None:
    """An inner middleware may change the status; a change by an outer middleware is too late."""

    def answering(status: int) -> Middleware:
        async def dispatch(request: Request, call_next: Next) -> Response:
            response = await call_next(request)
            response.status_code = status
            return response

        return Middleware(BaseHTTPMiddleware, dispatch=dispatch)

    app = starlette_on(running, answering(418), ours(running.database), answering(inner))
    assert (await get(app, "/kept")).status == 418
    assert running.stored() == outcome


@ASYNC
async def test_outside_of_our_middleware_there_is_no_session(running: Running) -> None:
    """A middleware that needs a session is added before ours, and so runs inside of it."""
    messages = []

    async def too_far_out(request: Request, call_next: Next) -> Response:
        try:
            get_session()
        except NoSession as error:
            messages.append(str(error))
        return await call_next(request)

    outer = Middleware(BaseHTTPMiddleware, dispatch=too_far_out)
    exchange = await get(starlette_on(running, outer, ours(running.database)), "/kept")
    assert exchange.status == 201
    assert ["that wraps the code" in message for message in messages] == [True]


@ASYNC
@PLACES
async def test_the_answer_to_a_failed_commit_has_cors_headers_where_cors_is_outside(
    running: Running, place: str
) -> None:
    """Without CORS headers, a browser hides the error from the code of the page."""
    middleware = [ours(running.database, on_commit_error=taken), OTHERS["CORSMiddleware"]]
    app = starlette_on(running, *(middleware if place == "inside" else reversed(middleware)))
    exchange = Exchange(app, "/doomed")
    exchange.scope["headers"] += [(b"origin", b"https://shop.test")]
    await exchange.run()
    assert exchange.status == 409
    headers = dict(exchange.messages[0]["headers"])
    assert (b"access-control-allow-origin" in headers) == (place == "outside")


# Where errors are handled


@BOTH
@pytest.mark.parametrize("keep", [False, True])
async def test_handlers_of_exceptions_run_inside_of_the_unit_of_work(
    running: Running, *, keep: bool
) -> None:
    """Work of an error handler follows the status of its response, or `set_rollback`."""

    async def handle(request: Request, error: Exception) -> Response:
        await running.write("by the handler of the error")
        if keep:
            set_rollback(False)
        return PlainTextResponse("no", status_code=404)

    async def raising(request: Request) -> Response:
        raise HTTPException(404)

    app = starlette_on(
        running,
        ours(running.database),
        routes=[Route("/", raising)],
        exception_handlers={HTTPException: handle},
    )
    assert (await get(app)).status == 404
    assert running.stored() == (["by the handler of the error"] if keep else [])


@ASYNC
async def test_the_handler_of_any_exception_runs_outside_and_has_begin(running: Running) -> None:
    """Starlette calls the handler for `Exception` and 500 outside of all middleware."""
    database: Any = running.database

    async def handle(request: Request, error: Exception) -> Response:
        with pytest.raises(NoSession, match=r"database\.begin\(\)"):
            get_session()
        async with database.begin() as session:
            await session.execute(ENTRY.insert().values(note="reported"))
        return PlainTextResponse("sorry", status_code=500)

    app = starlette_on(running, ours(database), exception_handlers={Exception: handle})
    exchange = await get(app, "/failing")
    assert (exchange.status, exchange.body) == (500, b"sorry")
    assert running.stored() == ["reported"]


# Sub-applications


@BOTH
async def test_a_mounted_application_with_the_same_database_joins(running: Running) -> None:
    """There is one session and one COMMIT: the outer middleware decides and answers."""
    sessions = []

    async def handler(request: Request) -> Response:
        sessions.append(running.database.get_session())
        return await serve(request)

    async def look(request: Request, call_next: Next) -> Response:
        sessions.append(running.database.get_session())
        return await call_next(request)

    inner = starlette_on(
        running,
        ours(running.database, commit_when=lambda _: True, on_commit_error=lambda _: None),
        routes=[Route("/{what}", handler)],
    )
    outer = starlette_on(
        running,
        ours(running.database, on_commit_error=taken),
        Middleware(BaseHTTPMiddleware, dispatch=look),
        routes=[Mount("/sub", inner)],
    )
    statuses = [(await get(outer, f"/sub/{what}")).status for what in ("kept", "missing", "doomed")]
    assert statuses == [201, 404, 409]
    assert sessions[0] is sessions[1]
    assert running.stored() == ["kept"]


@ASYNC
async def test_a_mounted_application_with_a_database_of_its_own_has_both(
    running: Running, tmp_path: Any
) -> None:
    """The inner default database is committed first; the outer middleware keeps its own."""
    reports = AsyncDatabase(f"sqlite:///{tmp_path}/test.db", connect_args={"timeout": 0})
    order = []

    async def handler(request: Request) -> Response:
        assert get_session() is reports.get_session()
        for database in (running.database, reports):
            session: Any = database.get_session()
            await session.execute(ENTRY.select())
            event.listen(
                session.sync_session, "after_commit", lambda _, d=database: order.append(d)
            )
        return PlainTextResponse("ok")

    inner = starlette_on(running, ours(reports), routes=[Route("/", handler)])
    outer = starlette_on(running, ours(running.database), routes=[Mount("/sub", inner)])
    async with reports:
        exchange = await get(outer, "/sub/")
    assert (exchange.status, exchange.error) == (200, None)
    assert order == [reports, running.database]


@ASYNC
async def test_a_mounted_application_hears_of_no_lifespan_and_is_told_so(
    real: Any, tmp_path: Any
) -> None:
    """The outermost middleware has the database too, and so starts it."""
    main = real.describe()
    running = Running(real, main)
    reports = AsyncDatabase(f"sqlite:///{tmp_path}/reports.db")

    async def handler(request: Request) -> Response:
        return PlainTextResponse(str(get_session() is reports.get_session()))

    inner = starlette_on(running, ours(reports), routes=[Route("/", handler)])
    alone = starlette_on(running, ours(main), routes=[Mount("/sub", inner)])
    told = pytest.raises(DatabaseNotRunning, match=r"give the database to the outermost DBSession")
    with TestClient(alone) as client, told:
        client.get("/sub/")
    both = starlette_on(running, ours(main, reports), routes=[Mount("/sub", inner)])
    with TestClient(both) as client:
        assert client.get("/sub/").text == "True"


# Single routes


def on_one_route(running: Running, middleware: Middleware) -> list[BaseRoute]:
    """An application with our middleware on the route."""
    return [Route("/{what}", serve, middleware=[middleware])]


def on_one_mount(running: Running, middleware: Middleware) -> list[BaseRoute]:
    """An application with our middleware on a group of routes."""
    return [Mount("/", routes=[Route("/{what}", serve)], middleware=[middleware])]


def on_one_router(running: Running, middleware: Middleware) -> list[BaseRoute]:
    """An application with our middleware on a router."""
    return [Mount("/", Router([Route("/{what}", serve)], middleware=[middleware]))]


@BOTH
@pytest.mark.parametrize("routes", [on_one_route, on_one_mount, on_one_router])
async def test_middleware_on_a_single_route_keeps_the_promises(
    running: Running, routes: Callable[..., list[BaseRoute]]
) -> None:
    """The application's own lifespan starts the database, because a route gets no lifespan."""
    middleware = ours(running.database, on_commit_error=taken)
    app = starlette_on(running, routes=routes(running, middleware))
    statuses = [(await get(app, f"/{what}")).status for what in ("kept", "missing", "doomed")]
    assert statuses == [201, 404, 409]
    assert running.stored() == ["kept"]


@BOTH
async def test_a_failed_commit_on_a_route_of_its_own_is_the_applications_to_answer(
    running: Running,
) -> None:
    """The exception leaves our middleware unchanged, because the exception handlers are outside."""

    def handle(request: Request, error: Exception) -> Response:
        return PlainTextResponse(type(error).__name__, status_code=409)

    app = starlette_on(
        running,
        routes=on_one_route(running, ours(running.database)),
        exception_handlers={IntegrityError: handle},
    )
    exchange = await get(app, "/doomed")
    assert (exchange.status, exchange.body, exchange.error) == (409, b"IntegrityError", None)
    assert running.stored() == []


@BOTH
async def test_a_route_class_of_fastapi_works_around_the_handler_in_the_same_unit(
    running: Running,
) -> None:
    """Work of the dependency before and after the handler is committed or rolled back with it."""

    class Audited(APIRoute):
        def get_route_handler(self) -> Any:
            handler = super().get_route_handler()

            async def audited(request: Request) -> Response:
                await running.write(f"before {request.path_params['what']}")
                response: Response = await handler(request)
                await running.write(f"after {request.path_params['what']}")
                return response

            return audited

    router = APIRouter(route_class=Audited)

    @router.get("/{what}")
    async def endpoint(what: str) -> str:
        await running.write(what)
        if what == "missing":
            raise HTTPException(404)
        return what

    app = FastAPI(middleware=[ours(running.database)])
    app.include_router(router)
    assert [(await get(app, path)).status for path in ("/kept", "/missing")] == [200, 404]
    assert running.stored() == ["before kept", "kept", "after kept"]


# Installed twice


@BOTH
async def test_installed_twice_by_mistake_it_is_as_installed_once(real: Any) -> None:
    """There is one session and one COMMIT; the engine is started and stopped once."""
    database = real.describe()
    running = Running(real, database)
    sessions = set()

    async def look(request: Request, call_next: Next) -> Response:
        sessions.add(database.get_session())
        return await call_next(request)

    looking = Middleware(BaseHTTPMiddleware, dispatch=look)
    app = starlette_on(running, ours(database), looking, ours(database), looking)
    with TestClient(app, raise_server_exceptions=False) as client:
        statuses = [client.get(f"/{what}").status_code for what in ("kept", "missing", "doomed")]
        assert database.is_running
    assert statuses == [201, 404, 500]
    assert len(sessions) == 3
    assert not database.is_running
    assert real.stored() == ["kept"]


@ASYNC
async def test_installed_twice_by_url_the_inner_one_is_the_default(real: Any) -> None:
    """Two objects are two databases, even for one file; the outer one is not used."""

    async def handler(request: Request) -> Response:
        await get_session().execute(ENTRY.insert().values(note="kept"))
        return PlainTextResponse("ok")

    url = real.url.render_as_string()
    app = Starlette(routes=[Route("/", handler)], middleware=[ours(url), ours(url)])
    with TestClient(app) as client:
        assert client.get("/").status_code == 200
    assert real.stored() == ["kept"]


@ASYNC
async def test_a_lifespan_of_the_applications_own_may_start_what_a_route_uses(real: Any) -> None:
    """`async with database:` starts it where no lifespan reaches the middleware."""
    database = real.describe()

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with database:
            yield

    running = Running(real, database)
    app = starlette_on(running, routes=on_one_route(running, ours(database)), lifespan=lifespan)
    with TestClient(app) as client:
        assert client.get("/kept").status_code == 201
    assert not database.is_running
    assert real.stored() == ["kept"]
