"""Tests the session as an injected parameter, in several frameworks."""

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from typing import Annotated, Any, cast

import httpx2
import pytest
import strawberry
from asgi import get
from conftest import ENTRY, Running, checked_out
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from litestar import Litestar, Response as LitestarResponse, get as litestar_get
from litestar.di import NamedDependency, Provide
from litestar.params import FromPath, FromQuery
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from strawberry.asgi import GraphQL
from strawberry.extensions import SchemaExtension

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DBSessionMiddleware,
    SyncDatabase,
    get_session,
    get_sync_session,
    session_dependency,
    set_rollback,
)

pytestmark = pytest.mark.anyio

ASYNC = pytest.mark.parametrize("real", ["sqlite"], indirect=True)
SYNC = pytest.mark.parametrize("real", ["sqlite-sync"], indirect=True)
BOTH = pytest.mark.parametrize("real", ["sqlite", "sqlite-sync"], indirect=True)

Injected = Annotated[AsyncSession, Depends(session_dependency)]


def note(text: str) -> Any:
    """The statement that stores a note."""
    return ENTRY.insert().values(note=text)


def fastapi_on(*databases: Any, **options: Any) -> FastAPI:
    """An application with the middleware, installed as its users install it."""
    app = FastAPI()
    app.add_middleware(cast("Any", DBSessionMiddleware), *databases, **options)
    return app


def plain_dependency() -> AsyncSession:
    """What FastAPI runs in its thread pool."""
    return get_session()


class Repository:
    """A class that FastAPI instantiates for each request."""

    def __init__(self, session: Injected) -> None:
        self.session = session


async def nested_dependency(repository: Annotated[Repository, Depends()]) -> AsyncSession:
    """A dependency of dependencies."""
    return repository.session


async def yielding_dependency(session: Injected) -> AsyncIterator[AsyncSession]:
    """Most existing applications have this form."""
    yield session


# Parameters in FastAPI


async def test_nothing_of_ours_is_in_the_openapi_schema() -> None:
    """In each form of injection, the only parameters and models are those of the application."""
    shop = AsyncDatabase("sqlite+aiosqlite://")
    ledger = SyncDatabase("sqlite://")
    dependencies: list[Callable[..., Any]] = [
        session_dependency,
        shop.session_dependency,
        ledger.session_dependency,
        plain_dependency,
        Repository,
        nested_dependency,
        yielding_dependency,
    ]
    app = fastapi_on(shop, ledger)
    for number, dependency in enumerate(dependencies):

        async def serve(q: int, session: Annotated[Any, Depends(dependency)]) -> None:
            """Handle a request with an injected session."""

        def serve_in_thread(q: int, session: Annotated[Any, Depends(dependency)]) -> None:
            """Handle a request with an injected session."""

        app.get(f"/async/{number}")(serve)
        app.get(f"/def/{number}", dependencies=[Depends(dependency)])(serve_in_thread)
    schema = app.openapi()
    assert len(schema["paths"]) == 2 * len(dependencies)
    for path in schema["paths"].values():
        (parameter,) = path["get"]["parameters"]
        assert (parameter["name"], parameter["in"]) == ("q", "query")
        assert "requestBody" not in path["get"]
    assert set(schema["components"]["schemas"]) == {"HTTPValidationError", "ValidationError"}


# FastAPI: the session


@ASYNC
@pytest.mark.parametrize(
    "dependency",
    [session_dependency, plain_dependency, nested_dependency, yielding_dependency],
    ids=lambda each: each.__name__,
)
async def test_an_injected_session_is_the_session_of_the_request(
    running: Running, dependency: Callable[..., Any]
) -> None:
    """Each request has one session, injected directly, in a dependency, or from `get_session()`."""
    app = fastapi_on(running.database)
    seen: list[AsyncSession] = []

    @app.get("/{status}")
    async def serve(
        status: int, session: Annotated[AsyncSession, Depends(dependency)], direct: Injected
    ) -> Response:
        assert session is direct is get_session() is running.database.get_session()
        seen.append(session)
        await session.execute(note(f"of {status}"))
        return Response(status_code=status)

    assert [(await get(app, f"/{status}")).status for status in (201, 400)] == [201, 400]
    assert seen[0] is not seen[1]
    assert running.stored() == ["of 201"]


@ASYNC
async def test_each_database_has_its_own_dependency(running: Running, tmp_path: Any) -> None:
    """One handler may get an async and a sync session."""
    ledger = SyncDatabase(f"sqlite:///{tmp_path}/ledger.db")
    reports = AsyncDatabase(f"sqlite:///{tmp_path}/reports.db")
    app = fastapi_on(running.database, reports, ledger)

    @app.get("/")
    async def serve(
        main: Injected,
        other: Annotated[AsyncSession, Depends(reports.session_dependency)],
        blocking: Annotated[Session, Depends(ledger.session_dependency)],
    ) -> list[bool]:
        return [
            main is running.database.get_session(),
            other is reports.get_session(),
            blocking is ledger.get_session() is get_sync_session(),
            other is not main,
        ]

    async with reports, ledger:
        assert (await get(app)).body == b"[true,true,true,true]"


@ASYNC
async def test_an_application_that_asks_for_nothing_opens_nothing(running: Running) -> None:
    """A handler that does not use its injected session holds no connection."""
    app = fastapi_on(running.database)

    @app.get("/")
    async def serve(session: Injected) -> dict[str, int]:
        return {"held": checked_out(running.database)}

    assert (await get(app)).body == b'{"held":0}'


# FastAPI: tests of an application


@ASYNC
async def test_dependency_overrides_replace_the_session_in_a_test(running: Running) -> None:
    """If a test gives its own session, only the test can roll back the work."""
    app = fastapi_on(running.database)

    @app.get("/")
    async def serve(session: Injected) -> str:
        await session.execute(note("of a test"))
        return "ok"

    database = cast("AsyncDatabase[AsyncSession]", running.database)
    async with database.begin() as session:
        app.dependency_overrides[session_dependency] = lambda: session
        assert (await get(app)).status == 200
        assert (await session.scalars(select(ENTRY.c.note))).all() == ["of a test"]
        assert running.stored() == []
        await session.rollback()
    app.dependency_overrides.clear()
    assert running.stored() == []
    assert (await get(app)).status == 200
    assert running.stored() == ["of a test"]


@ASYNC
async def test_the_override_of_one_database_leaves_the_others_alone(
    running: Running, tmp_path: Any
) -> None:
    """`reports.session_dependency` works as a key, although each access makes a new method."""
    reports = AsyncDatabase(f"sqlite:///{tmp_path}/reports.db")
    app = fastapi_on(running.database, reports)

    @app.get("/")
    async def serve(
        main: Annotated[Any, Depends(running.database.session_dependency)],
        other: Annotated[Any, Depends(reports.session_dependency)],
    ) -> list[bool]:
        return [main is running.database.get_session(), other == "instead"]

    app.dependency_overrides[reports.session_dependency] = lambda: "instead"
    async with reports:
        assert (await get(app)).body == b"[true,true]"


# FastAPI: middleware that decides after `call_next`


@ASYNC
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("is_above", [False, True])
async def test_a_middleware_that_refuses_after_call_next_belongs_above(
    running: Running, *, is_above: bool, fails: bool
) -> None:
    """Below `add_middleware(DBSessionMiddleware, …)` it is outside, and runs after COMMIT."""

    async def refuse(request: Request, call_next: Callable[[Request], Any]) -> Response:
        await call_next(request)
        if fails:
            raise LookupError
        return Response(status_code=403)

    app = FastAPI()
    if is_above:
        app.middleware("http")(refuse)
    app.add_middleware(DBSessionMiddleware, running.database)
    if not is_above:
        app.middleware("http")(refuse)

    @app.get("/")
    async def handler(session: Injected) -> None:
        await session.execute(note("refused"))

    exchange = await get(app)
    assert exchange.status == (500 if fails else 403)
    assert running.stored() == ([] if is_above else ["refused"])


# FastAPI: `def` handlers and dependencies


@SYNC
@pytest.mark.parametrize("way", ["parameter", "accessor", "def dependency"])
async def test_a_def_handler_has_a_sync_session(running: Running, way: str) -> None:
    """The session is injected or requested in the thread: COMMIT below 400, ROLLBACK otherwise."""
    app = fastapi_on(running.database)

    def in_thread() -> Session:
        return get_sync_session()

    dependency = running.database.session_dependency if way == "parameter" else in_thread

    @app.get("/{status}")
    def serve(status: int, injected: Annotated[Any, Depends(dependency)]) -> Response:
        session = get_sync_session() if way == "accessor" else injected
        session.execute(note(f"of {status}"))
        if status == 404:
            raise HTTPException(404)
        return Response(status_code=status)

    assert [(await get(app, f"/{each}")).status for each in (201, 400, 404)] == [201, 400, 404]
    assert running.stored() == ["of 201"]


@ASYNC
async def test_a_def_handler_that_wants_a_sync_session_of_an_async_database_is_told_how(
    running: Running,
) -> None:
    """`get_session()` would not help there, because a thread cannot await anything."""
    app = fastapi_on(running.database)

    @app.get("/")
    def serve() -> None:
        get_sync_session()

    exchange = await get(app)
    assert isinstance(exchange.error, ConfigurationError)
    assert "`async def`" in str(exchange.error)
    assert "SyncDatabase" in str(exchange.error)


@ASYNC
@pytest.mark.filterwarnings("ignore:.*was never awaited:RuntimeWarning")
async def test_a_def_handler_cannot_await_and_is_told_so(running: Running) -> None:
    """Without the error, the handler would answer 200 and store nothing."""
    app = fastapi_on(running.database)

    @app.get("/")
    def serve() -> str:
        get_session().execute(note("never"))  # type: ignore[unused-coroutine]
        return "ok"

    exchange = await get(app)
    assert isinstance(exchange.error, ConfigurationError)
    assert "use a SyncDatabase" in str(exchange.error)
    assert running.stored() == []


@ASYNC
async def test_an_async_handler_that_forgets_to_await_is_warned_by_python(
    running: Running,
) -> None:
    """The statement never started, so the package cannot know about it."""
    app = fastapi_on(running.database)

    @app.get("/")
    async def serve(session: Injected) -> str:
        session.execute(note("never"))  # type: ignore[unused-coroutine]
        return "ok"

    with pytest.warns(RuntimeWarning, match=r"AsyncSession.execute' was never awaited"):
        assert (await get(app)).status == 200
    assert running.stored() == []


# FastAPI: dependencies with `yield`


def with_yield(running: Running, log: list[str]) -> Callable[..., Any]:
    """A dependency of the application that works before and after the handler."""

    async def around() -> AsyncIterator[None]:
        await running.write("before")
        try:
            yield
        except Exception as error:
            log.append(type(error).__name__)
            raise
        finally:
            await running.write("after")

    def around_in_thread() -> Iterator[None]:
        session = cast("Session", running.database.get_session())
        session.execute(note("before"))
        try:
            yield
        except Exception as error:
            log.append(type(error).__name__)
            raise
        finally:
            session.execute(note("after"))

    return around_in_thread if running.real.is_sync else around


def around_a_handler(running: Running, log: list[str], scope: Any, **options: Any) -> FastAPI:
    """An application whose handler runs inside such a dependency."""
    app = fastapi_on(running.database, **options)
    dependency = Depends(with_yield(running, log), scope=scope)

    @app.get("/{what}", dependencies=[dependency])
    async def serve(what: str) -> str:
        await running.write("handler")
        if what == "doomed":
            await running.doom()
        if what == "raised":
            raise HTTPException(404)
        return what

    @app.exception_handler(IntegrityError)
    async def handle(request: Any, error: Exception) -> Response:
        log.append("handled")
        return PlainTextResponse("handled", status_code=418)

    return app


@BOTH
async def test_exit_code_runs_after_the_response_as_a_unit_of_its_own(running: Running) -> None:
    """By default FastAPI runs the code after `yield` after the response, and its work is stored."""
    stored_at: list[list[str]] = []
    app = around_a_handler(running, [], None)
    exchange = await get(app, "/kept", on_message=lambda _: stored_at.append(running.stored()))
    assert (exchange.status, exchange.error) == (200, None)
    assert stored_at == [["before", "handler"]] * 2
    assert running.stored() == ["before", "handler", "after"]


@BOTH
async def test_exit_code_of_a_function_scope_belongs_to_the_response(running: Running) -> None:
    """With `Depends(…, scope="function")` this code runs before the response and its COMMIT."""
    stored_at: list[list[str]] = []
    app = around_a_handler(running, [], "function")
    exchange = await get(app, "/kept", on_message=lambda _: stored_at.append(running.stored()))
    assert (exchange.status, exchange.error) == (200, None)
    assert stored_at == [["before", "handler", "after"]] * 2


@BOTH
@pytest.mark.parametrize("scope", [None, "function"])
async def test_exit_code_after_an_exception_is_rolled_back_with_the_rest(
    running: Running, scope: str | None
) -> None:
    """The code runs before the error response; work that must stay needs `begin()`."""
    log: list[str] = []
    exchange = await get(around_a_handler(running, log, scope), "/raised")
    assert (exchange.status, exchange.error) == (404, None)
    assert log == ["HTTPException"]
    assert running.stored() == []


@BOTH
async def test_exit_code_after_a_failed_commit_runs_and_stores_nothing(running: Running) -> None:
    """`except` in the dependency does not see the error, `finally` runs, and no handler answers."""
    log: list[str] = []
    app = around_a_handler(
        running, log, None, on_commit_error=lambda _: PlainTextResponse("taken", status_code=409)
    )
    exchange = await get(app, "/doomed")
    assert (exchange.status, exchange.body, exchange.error) == (409, b"taken", None)
    assert log == []
    assert running.stored() == []


@BOTH
async def test_exit_code_that_fails_after_the_response_loses_only_its_own_work(
    running: Running,
) -> None:
    """The client has its response, which stays true; the error reaches the server."""
    app = fastapi_on(running.database)

    async def failing() -> AsyncIterator[None]:
        yield
        await running.write("half")
        raise LookupError

    @app.get("/", dependencies=[Depends(failing)])
    async def serve() -> str:
        await running.write("kept")
        return "ok"

    exchange = await get(app)
    assert exchange.status == 200
    assert isinstance(exchange.error, LookupError)
    assert running.stored() == ["kept"]


# FastAPI: errors, validation, streams, background tasks


@BOTH
async def test_a_request_that_is_invalid_rolls_back_what_dependencies_did(
    running: Running,
) -> None:
    """FastAPI runs dependencies even if another parameter is wrong, and answers 422 then."""
    app = fastapi_on(running.database)
    ran = []

    async def count_the_call() -> None:
        await running.write("counted")
        ran.append(True)

    @app.get("/", dependencies=[Depends(count_the_call)])
    async def serve(q: int) -> int:
        return q

    assert (await get(app)).status == 422
    assert ran == [True]
    assert running.stored() == []


@BOTH
async def test_an_exception_handler_that_answers_success_commits(running: Running) -> None:
    """The status decides, after any exception before it; `set_rollback(True)` overrides it."""
    app = fastapi_on(running.database)

    @app.exception_handler(LookupError)
    async def handle(request: Any, error: LookupError) -> Response:
        if error.args == ("rolled back",):
            set_rollback(True)
        return JSONResponse({"found": False})

    @app.get("/{what}")
    async def serve(what: str) -> None:
        await running.write(what)
        raise LookupError(what)

    for path in ("/kept", "/rolled back"):
        assert (await get(app, path)).body == b'{"found":false}'
    assert running.stored() == ["kept"]


@BOTH
@pytest.mark.parametrize("what", ["kept", "doomed", "failing"])
async def test_background_tasks_are_a_unit_of_their_own(running: Running, what: str) -> None:
    """The task runs after COMMIT, with the same session; after a failed COMMIT it does not run."""
    app = fastapi_on(running.database)
    stored_before: list[list[str]] = []

    async def work() -> None:
        stored_before.append(running.stored())
        await running.write("background")
        if what == "failing":
            raise LookupError

    @app.get("/")
    async def serve(background: BackgroundTasks) -> str:
        await running.write("handler")
        if what == "doomed":
            await running.doom()
        background.add_task(work)
        return "ok"

    exchange = await get(app)
    assert stored_before == ([] if what == "doomed" else [["handler"]])
    assert (
        running.stored()
        == {
            "kept": ["handler", "background"],
            "doomed": [],
            "failing": ["handler"],
        }[what]
    )
    error = {"kept": type(None), "doomed": IntegrityError, "failing": LookupError}[what]
    assert isinstance(exchange.error, error)


@ASYNC
@pytest.mark.parametrize("way", ["StreamingResponse", "yield"])
async def test_a_body_goes_on_with_the_injected_session(running: Running, way: str) -> None:
    """A `StreamingResponse`, and an endpoint with `yield`, which FastAPI sends as JSON."""
    app = fastapi_on(running.database)

    async def parts(session: AsyncSession) -> AsyncIterator[str]:
        for number in range(2):
            await session.execute(note(f"part {number}"))
            yield f"part {number}"

    if way == "yield":

        @app.get("/")
        async def serve(session: Injected) -> AsyncIterable[str]:
            await session.execute(note("handler"))
            async for part in parts(session):
                yield part

    else:

        @app.get("/")
        async def stream(session: Injected) -> StreamingResponse:
            await session.execute(note("handler"))
            return StreamingResponse(parts(session))

    exchange = await get(app)
    assert (exchange.status, exchange.error) == (200, None)
    assert exchange.body.count(b"part") == 2
    assert running.stored() == ["handler", "part 0", "part 1"]


# Litestar


@ASYNC
async def test_litestar_provides_the_session(running: Running, tmp_path: Any) -> None:
    """The dependency works everywhere, and the OpenAPI schema does not show it."""
    reports = AsyncDatabase(f"sqlite:///{tmp_path}/reports.db")

    @litestar_get("/{status:int}", dependencies={"other": Provide(reports.session_dependency)})
    async def serve(
        status: FromPath[int],
        q: FromQuery[int],
        session: NamedDependency[AsyncSession],
        other: NamedDependency[AsyncSession],
    ) -> Any:
        assert session is get_session()
        assert other is reports.get_session()
        await session.execute(note(f"of {status}"))
        return LitestarResponse("ok", status_code=status)

    app = Litestar(
        [serve], logging_config=None, dependencies={"session": Provide(session_dependency)}
    )
    served: Any = DBSessionMiddleware(cast("Any", app), running.database, reports)
    async with (
        reports,
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app=served)) as client,
    ):
        for status in (201, 400):
            response = await client.get(f"http://test/{status}?q=1")
            assert response.status_code == status, response.text
    assert running.stored() == ["of 201"]
    (path,) = cast("Any", app.openapi_schema.to_schema()["paths"]).values()
    assert [each["name"] for each in path["get"]["parameters"]] == ["status", "q"]


# GraphQL, and code without an injected parameter


async def deep(levels: int, text: str) -> None:
    """Store a note, ten calls deep, without a session parameter."""
    if levels:
        await deep(levels - 1, text)
    else:
        await get_session().execute(note(text))


class RollBackOnErrors(SchemaExtension):
    """Strawberry answers 200 even after an error, so roll back explicitly."""

    def on_operation(self) -> Iterator[None]:
        """Decide after the operation is done."""
        yield
        if self.execution_context.pre_execution_errors or (
            self.execution_context.result is not None
            and cast("Any", self.execution_context.result).errors
        ):
            set_rollback(True)


def graphql(extensions: list[type[SchemaExtension]]) -> GraphQL[Any, Any]:
    """An application that stores notes with GraphQL."""

    @strawberry.type
    class Query:
        @strawberry.field
        async def notes(self) -> list[str]:
            return list(await get_session().scalars(select(ENTRY.c.note)))

    @strawberry.type
    class Mutation:
        @strawberry.mutation
        async def add(self, text: str, *, fail: bool = False) -> str:
            await deep(10, text)
            if fail:
                raise LookupError("after the write")
            return text

    return GraphQL(strawberry.Schema(Query, Mutation, extensions=extensions))


async def ask(app: Any, query: str) -> Any:
    """Send a GraphQL operation, and return the result."""
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app)) as client:
        response = await client.post("http://test/", json={"query": query})
        assert response.status_code == 200, response.text
        return response.json()


@ASYNC
async def test_a_resolver_ten_calls_above_the_database_passes_nothing_down(
    running: Running,
) -> None:
    """`get_session()` returns the session of the request at any depth."""
    app = DBSessionMiddleware(graphql([]), running.database)
    answer = await ask(app, 'mutation { one: add(text: "one") two: add(text: "two") }')
    assert answer["data"] == {"one": "one", "two": "two"}
    assert running.stored() == ["one", "two"]
    assert (await ask(app, "{ notes }"))["data"] == {"notes": ["one", "two"]}


@ASYNC
@pytest.mark.parametrize("extension", [False, True])
async def test_a_mutation_that_failed_is_rolled_back_where_an_extension_says_so(
    running: Running, *, extension: bool
) -> None:
    """GraphQL answers 200 for errors too, so the status alone would commit the work."""
    app = DBSessionMiddleware(graphql([RollBackOnErrors] if extension else []), running.database)
    answer = await ask(app, 'mutation { add(text: "half", fail: true) }')
    assert answer["errors"][0]["message"] == "after the write"
    assert running.stored() == ([] if extension else ["half"])
    assert checked_out(running.database) == 0
