"""Tests the promises with Starlette, which handles errors in its own way."""

from collections.abc import Callable
from typing import Any

import pytest
from anyio import to_thread
from asgi import get
from conftest import Running
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from asgi_dbsession import DBSessionMiddleware, SyncDatabase

pytestmark = pytest.mark.anyio


class Shop:
    """An application that handles each error that it can, and records the handled errors."""

    def __init__(self, running: Running, *, mounted: bool = False, **options: Any) -> None:
        self.running = running
        self.handled: list[str] = []
        self.background: list[str] = []
        handlers: dict[Any, Any] = {
            IntegrityError: self.handler("IntegrityError"),
            Exception: self.handler("Exception"),
        }
        routes: list[Any] = [Route("/{what}", self.serve)]
        middleware = [
            Middleware(DBSessionMiddleware, running.database, **options),
            Middleware(GZipMiddleware),
        ]
        if mounted:
            routes = [Mount("/", Starlette(routes=routes, exception_handlers=handlers))]
        self.app = Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={} if mounted else handlers,
        )

    def handler(self, name: str) -> Callable[[Request, Exception], Response]:
        """Answer an error, and record it."""

        def handle(request: Request, error: Exception) -> Response:
            self.handled.append(name)
            return PlainTextResponse(name, status_code=418)

        return handle

    async def serve(self, request: Request) -> Response:
        """Do what the path says."""
        what = request.path_params["what"]
        await self.running.write(what)
        if what == "doomed":
            await self.running.doom()
        if what == "raised":
            raise HTTPException(404)
        if what == "integrity":
            raise IntegrityError("INSERT", None, Exception("of the handler's own"))
        task = BackgroundTask(self.background.append, what)
        return PlainTextResponse(what, status_code=201, background=task)


@pytest.mark.parametrize("mounted", [False, True])
async def test_a_handler_for_that_very_error_does_not_answer_a_failed_commit(
    running: Running, *, mounted: bool
) -> None:
    """The error is not wrapped: the server gets it, and no background task has run."""
    shop = Shop(running, mounted=mounted)
    exchange = await get(shop.app, "/doomed")
    assert isinstance(exchange.error, IntegrityError)
    assert "IntegrityError" not in shop.handled
    assert shop.background == []
    assert exchange.status in (418, 500)  # of Starlette's outermost middleware, outside of ours
    assert running.stored() == []


@pytest.mark.parametrize("mounted", [False, True])
async def test_on_commit_error_answers_although_a_handler_for_the_error_is_there(
    running: Running, *, mounted: bool
) -> None:
    """There is exactly one response, from `on_commit_error`."""
    shop = Shop(
        running,
        mounted=mounted,
        on_commit_error=lambda error: PlainTextResponse(type(error).__name__, status_code=409),
    )
    exchange = await get(shop.app, "/doomed")
    assert (exchange.status, exchange.body, exchange.error) == (409, b"IntegrityError", None)
    assert (shop.handled, shop.background) == ([], [])
    assert running.stored() == []


async def test_a_handler_still_answers_the_same_error_of_a_request_handler(
    running: Running,
) -> None:
    """The application handles its own exceptions; the status of its response decides."""
    shop = Shop(running)
    exchange = await get(shop.app, "/integrity")
    assert (exchange.status, exchange.body) == (418, b"IntegrityError")
    assert running.stored() == []


async def test_a_status_that_was_raised_rolls_back(running: Running) -> None:
    """`HTTPException` becomes a response inside of the middleware."""
    exchange = await get(Shop(running).app, "/raised")
    assert (exchange.status, exchange.error) == (404, None)
    assert running.stored() == []


async def test_a_background_task_runs_after_the_commit(running: Running) -> None:
    """The background task sees the rows that the handler has stored."""
    shop = Shop(running)
    exchange = await get(shop.app, "/kept")
    assert exchange.status == 201
    assert shop.background == ["kept"]
    assert running.stored() == ["kept"]


async def test_a_handler_written_with_def_uses_a_sync_session(running: Running) -> None:
    """It runs in a thread of the framework, and is committed like any other."""
    database = running.database
    if not isinstance(database, SyncDatabase):
        pytest.skip("an async session needs an async handler")

    def serve(request: Request) -> Response:
        session = database.get_session()
        session.connection().exec_driver_sql("INSERT INTO entry (note) VALUES ('kept')")
        return PlainTextResponse("ok", status_code=int(request.path_params["status"]))

    app = Starlette(routes=[Route("/{status}", serve)])
    app.add_middleware(DBSessionMiddleware, database)
    assert (await get(app, "/400")).status == 400
    assert running.stored() == []
    assert (await get(app, "/200")).status == 200
    assert running.stored() == ["kept"]
    assert to_thread.current_default_thread_limiter().borrowed_tokens == 0
