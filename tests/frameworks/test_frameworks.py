"""Tests the same promises under every framework, with the code of its documentation page."""

import asyncio
import importlib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import falcon
import falcon.testing
import pytest
from asgi import Exchange, Life
from blacksheep.testing import TestClient as BlackSheepClient
from conftest import Real, becomes_true, checked_out, postgresql
from django.test import AsyncClient  # type: ignore[import-untyped]
from django.urls import clear_url_caches  # type: ignore[import-untyped]
from fastapi import Depends
from litestar.middleware import DefineMiddleware
from pages import Page
from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.responses import PlainTextResponse

from asgi_dbsession import (
    AsyncDatabase,
    DBSessionMiddleware,
    NoSession,
    SessionClosed,
    SyncDatabase,
    get_session,
    session_dependency,
)

pytestmark = pytest.mark.anyio

WRAP = "Wrap the application instead"
ANSWER = "Answer a failed COMMIT"


@dataclass(frozen=True)
class Framework:
    """How the tests find their way in the page of a framework.

    Args:
        name: Its column in the table.
        page: The page's name.
        changes: The sections of the page whose `diff` makes this variant.
        module: The module that serves.
        without: What it has not, by the key that a test looks for, and why.
    """

    name: str
    page: str
    changes: tuple[str, ...] = ()
    module: str = "notes"
    without: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.name

    def needs(self, feature: str) -> None:
        """Skip the test if the framework does not have this feature."""
        if reason := dict(self.without).get(feature):
            pytest.skip(reason)


NO_OPENAPI = ("openapi", "The framework writes no OpenAPI document by itself")
DEF = "Views written with `def`"
OWN_500 = ("raises", "Litestar answers each exception of its middleware itself, with a 500")

FRAMEWORKS = (
    Framework("Starlette", "starlette", without=(NO_OPENAPI,)),
    Framework("Starlette, wrapped", "starlette", (WRAP,), without=(NO_OPENAPI,)),
    Framework("FastAPI", "fastapi"),
    Framework("FastAPI, wrapped", "fastapi", (WRAP,)),
    Framework("Litestar", "litestar", without=(OWN_500,)),
    Framework("Litestar, wrapped", "litestar", (WRAP,)),
    Framework("Quart", "quart", without=(NO_OPENAPI,)),
    Framework("Quart, wrapped", "quart", (WRAP,), without=(NO_OPENAPI,)),
    Framework("Falcon", "falcon", without=(NO_OPENAPI,)),
    Framework(
        "BlackSheep",
        "blacksheep",
        without=(
            NO_OPENAPI,
            ("background", "BlackSheep has no background tasks"),
        ),
    ),
    Framework(
        "Django",
        "django",
        module="project.asgi",
        without=(
            NO_OPENAPI,
            ("background", "Django runs background tasks in other processes"),
        ),
    ),
    Framework(
        "a bare function",
        "any-asgi-application",
        without=(
            NO_OPENAPI,
            ("raised", "A bare function has no HTTP exceptions"),
        ),
    ),
)

frameworks = pytest.mark.parametrize("framework", FRAMEWORKS, ids=str)
in_the_table = pytest.mark.matrix("Frameworks", "framework")


Session = Annotated[AsyncSession, Depends(session_dependency)]


@cache
def server() -> Real:
    """One database for all pages, which make their table themselves."""
    url, reader = postgresql("pages")
    return Real("asyncpg", url, reader)


class Served:
    """One application of a page, served in process."""

    def __init__(self, module: Any) -> None:
        self.module = module
        names = ("application", "asgi", "app")
        self.app: Any = next(getattr(module, name) for name in names if hasattr(module, name))

    @property
    def database(self) -> AsyncDatabase | SyncDatabase:
        """The database that its middleware serves."""
        found: AsyncDatabase | SyncDatabase
        found = getattr(self.module, "blocking", self.module.database)
        return found

    async def ask(self, method: str, path: str, content: Any = None, **options: Any) -> Exchange:
        """Send a request, and wait until the application has returned."""
        body = b"" if content is None else json.dumps(content).encode()
        return await Exchange(self.app, path, method=method, content=body, **options).run()


def stored() -> list[str]:
    """Return the notes of all rows that are stored."""
    with server().reader.connect() as connection:
        return list(connection.scalars(text("SELECT text FROM note ORDER BY id")))


def store(*notes: str) -> int:
    """Store rows over another connection, and return the id of the last row."""
    found = 0
    with server().reader.begin() as connection:
        for note in notes:
            statement = text("INSERT INTO note (text) VALUES (:note) RETURNING id")
            found = connection.scalar(statement, {"note": note}) or 0
    return found


def empty() -> None:
    """Delete all rows over another connection."""
    with server().reader.begin() as connection:
        if inspect(connection).has_table("note"):
            connection.execute(text("DELETE FROM note"))


class Pages:
    """Loads the files of pages from a folder, as a server would from the one it is started in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, framework: Framework, *changes: str, module: str = "") -> Served:
        """Write the files that the page shows, and import one of them."""
        files = Page(f"docs/how-to/{framework.page}.md").files(*framework.changes, *changes)
        for name, code in files.items():
            file = self.folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(code)
        importlib.invalidate_caches()
        return Served(importlib.import_module(module or framework.module))


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pages]:
    """Pages whose modules do not outlive the test, on a database with an empty table."""
    url = server().url.set(drivername="postgresql")  # a URL without a driver works for both kinds
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    # The page sets the variable; what the test sets before is what the fixture takes back.
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "")
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE")
    monkeypatch.syspath_prepend(tmp_path)
    empty()
    yield Pages(tmp_path)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    sys.modules.pop("project", None)
    clear_url_caches()


@asynccontextmanager
async def serving(served: Served) -> AsyncIterator[Served]:
    """Run the lifespan of the application around the block, and check its database at the end."""
    if hasattr(served.module, "create_tables") and served.module.__name__ == "project.asgi":
        await served.module.create_tables()
    life = await Life(served.app).startup()
    assert life.messages == [{"type": "lifespan.startup.complete"}]
    try:
        yield served
        assert checked_out(served.database) == 0
        await becomes_true(lambda: server().open_transactions() == 0)
    finally:
        await life.shutdown()
    assert life.messages[1:] == [{"type": "lifespan.shutdown.complete"}]
    assert life.error is None


@pytest.fixture
async def served(framework: Framework, pages: Pages) -> AsyncIterator[Served]:
    """The application of the page, running."""
    async with serving(pages.load(framework)) as application:
        yield application


@in_the_table
@frameworks
async def test_a_read_answers(framework: Framework, served: Served) -> None:
    """After a read, the connection is back in the pool before the first byte is sent."""
    found = store("first", "second")
    held = []
    exchange = await served.ask(
        "GET", f"/notes/{found}", on_message=lambda _: held.append(checked_out(served.database))
    )
    assert exchange.status == 200
    assert json.loads(exchange.body) == {"id": found, "text": "second"}
    assert set(held) == {0}


@in_the_table
@frameworks
async def test_a_write_is_stored_first(framework: Framework, served: Served) -> None:
    """A write is committed, and its connection is back, before the first byte is sent."""
    seen = []
    exchange = await served.ask(
        "POST",
        "/notes",
        {"text": "written"},
        on_message=lambda _: seen.append((stored(), checked_out(served.database))),
    )
    assert exchange.status == 201
    assert seen[0] == (["written"], 0)
    again = await served.ask("GET", f"/notes/{json.loads(exchange.body)['id']}")
    assert json.loads(again.body)["text"] == "written"


@in_the_table
@frameworks
async def test_a_status_that_is_returned(framework: Framework, served: Served) -> None:
    """A returned status of 400 or above rolls back."""
    exchange = await served.ask("POST", "/leave/returned")
    assert (exchange.status, exchange.error) == (409, None)
    assert stored() == []
    assert (await served.ask("POST", "/leave/well")).status in (200, 204)
    assert stored() == ["written"]


@in_the_table
@frameworks
async def test_a_status_that_is_raised(framework: Framework, served: Served) -> None:
    """An HTTP exception of the framework with a status of 400 or above rolls back."""
    assert (await served.ask("GET", "/notes/42")).status == 404
    framework.needs("raised")
    exchange = await served.ask("POST", "/leave/raised")
    assert exchange.status in (403, 409)
    assert exchange.error is None
    assert stored() == []


@in_the_table
@frameworks
async def test_an_exception_rolls_back(framework: Framework, served: Served) -> None:
    """An unhandled exception rolls back."""
    exchange = await served.ask("POST", "/leave/unhandled")
    assert exchange.status == 500 or isinstance(exchange.error, RuntimeError)
    assert stored() == []


@in_the_table
@frameworks
async def test_a_failed_commit_sends_nothing(framework: Framework, served: Served) -> None:
    """After a failed COMMIT, nothing of the response is sent and nothing is stored."""
    exchange = await served.ask("POST", "/notes", {"text": "doomed", "reply_to": 0})
    assert exchange.status in (None, 500)
    assert b"id" not in exchange.body
    assert stored() == []
    assert (await served.ask("POST", "/notes", {"text": "fine"})).status == 201
    assert stored() == ["fine"]


@in_the_table
@frameworks
async def test_the_error_of_a_failed_commit_is_itself(framework: Framework, served: Served) -> None:
    """The error of a failed COMMIT reaches the server unchanged."""
    framework.needs("raises")
    exchange = await served.ask("POST", "/notes", {"text": "doomed", "reply_to": 0})
    assert isinstance(exchange.error, IntegrityError)


@in_the_table
@frameworks
async def test_on_commit_error_answers(framework: Framework, pages: Pages) -> None:
    """`on_commit_error` can answer a failed COMMIT."""
    if framework.changes:
        wrapped = pages.load(framework)
        arguments = wrapped.module.app, wrapped.module.database
        wrapped.app = DBSessionMiddleware(*arguments, on_commit_error=lambda _: no_such_note)
    else:
        wrapped = pages.load(framework, ANSWER)
    async with serving(wrapped) as served:
        exchange = await served.ask("POST", "/notes", {"text": "doomed", "reply_to": 0})
        assert (exchange.status, exchange.error) == (409, None)
        assert b"no such note" in exchange.body
        assert stored() == []


@pytest.mark.parametrize(
    "framework",
    [each for each in FRAMEWORKS if not each.changes and each.page not in ("starlette", "fastapi")],
    ids=str,
)
async def test_the_same_error_at_a_flush_is_answered(framework: Framework, pages: Pages) -> None:
    """By the handler that stands next to `on_commit_error` on the page."""
    path = "/notes/or-409" if framework.page == "django" else "/notes"
    async with serving(pages.load(framework, ANSWER)) as served:
        exchange = await served.ask("POST", path, {"text": None})
        assert (exchange.status, exchange.error) == (409, None)
        assert b"the note is not complete" in exchange.body
        assert stored() == []
        assert (await served.ask("POST", path, {"text": "fine"})).status == 201
        assert stored() == ["fine"]


async def no_such_note(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 409, "headers": []})
    await send({"type": "http.response.body", "body": b"no such note"})


@in_the_table
@frameworks
async def test_a_streaming_body_writes(framework: Framework, served: Served) -> None:
    """The work of a streaming body is committed before its last byte is sent."""
    store("first", "second")
    seen = []
    exchange = await served.ask(
        "GET", "/export", on_message=lambda _: seen.append((stored(), checked_out(served.database)))
    )
    assert (exchange.status, exchange.body) == (200, b"first\nsecond\n")
    assert seen[0] == (["first", "second"], 0)
    assert seen[-1] == (["first", "second", "exported"], 0)
    assert {held for _, held in seen} == {0}  # nothing is held while the client reads


@in_the_table
@frameworks
async def test_a_client_hangs_up(framework: Framework, served: Served) -> None:
    """If a client disconnects during a streaming body, no connection stays checked out."""
    store("first", "second")

    def hang_up(message: Any) -> None:
        if message.get("body"):
            exchange.hang_up.set()

    exchange = Exchange(served.app, "/export", on_message=hang_up)
    await exchange.run()
    assert exchange.error is None
    assert checked_out(served.database) == 0
    await becomes_true(lambda: server().open_transactions() == 0)


@in_the_table
@frameworks
async def test_background_work(framework: Framework, served: Served) -> None:
    """A background task runs after COMMIT, in a transaction of its own."""
    framework.needs("background")
    seen = []
    exchange = await served.ask("POST", "/index", on_message=lambda _: seen.append(stored()))
    assert exchange.status == 202
    assert seen[0][0] == "now"
    await becomes_true(lambda: stored() == ["now", "later"])
    await becomes_true(lambda: checked_out(served.database) == 0)


@in_the_table
@frameworks
async def test_the_lifespan_has_the_engine(framework: Framework, pages: Pages) -> None:
    """The lifespan starts the engine and disposes it."""
    application = pages.load(framework)
    await becomes_true(lambda: server().connections() == 0)
    async with serving(application) as served:
        assert served.database.is_running
        assert server().connections() > 0
    assert not served.database.is_running
    await becomes_true(lambda: server().connections() == 0)


@in_the_table
@frameworks
async def test_code_that_blocks(framework: Framework, pages: Pages) -> None:
    """Blocking code works with a `SyncDatabase`, in `def` handlers where they exist."""
    if framework.changes:
        pytest.skip("Blocking code is tested with one way of installation")
    path = "/notes"
    if framework.page == "django":
        path = "/reports"
        reports = pages.load(framework, DEF)
    else:
        pages.load(framework).module.Base.metadata.create_all(server().reader)
        reports = pages.load(framework, module="reports")
    async with serving(reports) as served:
        store("first", "second")
        assert (await served.ask("GET", path)).body.strip(b'"') == b"2"
        exchange = await served.ask("DELETE", path)
        assert (exchange.status, exchange.error) == (409, None)
        assert stored() == ["first", "second"]
        empty()
        store("third")
        exchange = await served.ask("DELETE", path)
        assert (exchange.status, exchange.body.strip(b'"')) == (200, b"deleted")
        assert stored() == []


@in_the_table
@frameworks
async def test_openapi(framework: Framework, served: Served) -> None:
    """The OpenAPI document does not show the session."""
    framework.needs("openapi")
    path = "/schema/openapi.json" if framework.page == "litestar" else "/openapi.json"
    document = json.loads((await served.ask("GET", path)).body)
    operations = [each for path in document["paths"].values() for each in path.values()]
    assert len(operations) == 5
    names = {each["name"] for one in operations for each in one.get("parameters", ())}
    assert names == {"id", "way"}
    assert "session" not in json.dumps(document).lower()


def framework_named(name: str) -> Framework:
    return next(each for each in FRAMEWORKS if each.name == name)


async def test_fastapi_stores_nothing_for_a_result_that_does_not_fit(pages: Pages) -> None:
    """The response model is checked before the response starts."""
    application = pages.load(framework_named("FastAPI"))
    module = application.module

    async def misfit(session: Session) -> str:
        session.add(module.Note(text="misfit"))
        return "no number"

    application.app.post("/misfit", response_model=int)(misfit)
    async with serving(application) as served:
        assert (await served.ask("POST", "/misfit")).status == 500
        assert stored() == []


async def test_fastapi_stores_what_a_dependency_writes_after_its_yield(pages: Pages) -> None:
    """The client does not wait for the background task."""
    application = pages.load(framework_named("FastAPI"))
    module = application.module

    async def audited(session: Session) -> AsyncIterator[None]:
        yield
        session.add(module.Note(text="audited"))

    async def write(session: Session) -> None:
        session.add(module.Note(text="written"))

    application.app.post("/audited", dependencies=[Depends(audited)])(write)
    async with serving(application) as served:
        seen = []
        await served.ask("POST", "/audited", on_message=lambda _: seen.append(stored()))
        assert seen[-1] == ["written"]
        assert stored() == ["written", "audited"]


async def test_fastapi_lets_a_test_put_another_session_in_its_place(pages: Pages) -> None:
    """`dependency_overrides` works on `session_dependency` as on any other."""
    application = pages.load(framework_named("FastAPI"))

    class Shelf:
        async def get(self, entity: type, key: int) -> Any:
            return entity(id=key, text="from the shelf")

    application.app.dependency_overrides[session_dependency] = Shelf
    async with serving(application) as served:
        exchange = await served.ask("GET", "/notes/7")
        assert json.loads(exchange.body) == {"id": 7, "text": "from the shelf"}


@pytest.mark.parametrize("name", ["Starlette", "Starlette, wrapped"])
async def test_starlette_keeps_its_handler_of_all_exceptions_outside(
    pages: Pages, name: str
) -> None:
    """It has a session where the application is wrapped, and none where middleware was added."""
    application = pages.load(framework_named(name))
    found: list[object] = []

    async def handle(request: Any, error: Exception) -> PlainTextResponse:
        try:
            found.append(get_session())
        except NoSession as none:
            found.append(none)
        return PlainTextResponse("sorry", 500)

    application.module.app.add_exception_handler(Exception, handle)
    async with serving(application) as served:
        await served.ask("POST", "/leave/unhandled")
        assert isinstance(found[0], NoSession) == (name == "Starlette")


@pytest.mark.parametrize("name", ["Litestar", "Litestar, wrapped"])
async def test_litestar_runs_before_send_hooks_where_the_page_says(pages: Pages, name: str) -> None:
    """With a middleware the hook runs after COMMIT; in a wrapped application it runs before."""
    application = pages.load(framework_named(name))
    seen = []

    async def look(message: Any, scope: Any) -> None:
        seen.append(stored())

    application.module.app.before_send.append(look)
    async with serving(application) as served:
        assert (await served.ask("POST", "/notes", {"text": "written"})).status == 201
        assert seen[0] == (["written"] if name == "Litestar" else [])


async def test_litestar_can_define_the_middleware_with_a_database(pages: Pages) -> None:
    """The framework passes the application as a keyword argument, after the database."""
    database = pages.load(framework_named("Litestar")).database
    middleware: Any = DefineMiddleware(DBSessionMiddleware, database)(no_such_note)
    assert (middleware.app, middleware.databases) == (no_such_note, (database,))


async def test_quart_needs_its_test_app(pages: Pages, caplog: pytest.LogCaptureFixture) -> None:
    """A test client without a lifespan raises an error that says so."""
    app = pages.load(framework_named("Quart")).module.app
    assert (await app.test_client().get("/notes/1")).status_code == 500
    assert "`async with database:`" in caplog.text
    async with app.test_app() as running:
        assert (await running.test_client().get("/notes/1")).status_code == 404


async def test_quart_background_task_has_no_session_of_its_request(pages: Pages) -> None:
    """The request has ended, so the error names `database.begin()`."""
    application = pages.load(framework_named("Quart"))
    over, errors = asyncio.Event(), []

    async def late() -> None:
        await over.wait()
        try:
            get_session()
        except SessionClosed as closed:
            errors.append(closed)

    async def write_late() -> str:
        application.app.add_background_task(late)
        return "ok"

    application.app.post("/late")(write_late)
    async with serving(application) as served:
        await served.ask("POST", "/late")
        over.set()
        await becomes_true(lambda: len(errors) == 1)


async def test_falcon_sync_to_async_loses_the_session(pages: Pages) -> None:
    """`asyncio.to_thread` copies the context of the request."""
    application = pages.load(framework_named("Falcon"))

    class Threads:
        async def on_get(self, request: Any, response: Any) -> None:
            session = await asyncio.to_thread(get_session)
            with pytest.raises(NoSession, match=r"start the thread with `asyncio\.to_thread`"):
                await falcon.sync_to_async(get_session)
            response.media = session is get_session()

    application.module.app.add_route("/threads", Threads())
    async with serving(application) as served:
        assert (await served.ask("GET", "/threads")).body == b"true"


async def test_falcon_conductor_runs_the_lifespan(pages: Pages) -> None:
    """The middleware wraps the mounted application."""
    application = pages.load(framework_named("Falcon"))
    async with falcon.testing.ASGIConductor(application.app) as conductor:
        assert (await conductor.simulate_get("/notes/1")).status_code == 404
    assert not application.database.is_running


async def test_blacksheep_test_client_passes_the_middleware_by(
    pages: Pages, caplog: pytest.LogCaptureFixture
) -> None:
    """The handler gets `NoSession`, and the error gives the reason."""
    application = pages.load(framework_named("BlackSheep"))
    async with serving(application):
        response = await BlackSheepClient(application.module.app).get("/notes/1")
    assert response is not None
    assert response.status == 500
    assert "give this same database object" in caplog.text


async def test_django_async_client_passes_the_middleware_by(pages: Pages) -> None:
    """The view gets `NoSession`, and the error gives the reason."""
    application = pages.load(framework_named("Django"))
    async with serving(application):
        with pytest.raises(NoSession):
            await AsyncClient().get("/notes/1")


def by_default(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Add these options to the middleware of every page."""
    given = DBSessionMiddleware.__init__.__kwdefaults__ or {}
    monkeypatch.setattr(DBSessionMiddleware.__init__, "__kwdefaults__", given | options)


@contextmanager
def contended_table() -> Iterator[None]:
    """A table in which the first two writers of the note `contended` meet a conflict."""
    lose = (
        "CREATE SEQUENCE IF NOT EXISTS races",  # a rollback does not reset the sequence
        (
            "CREATE OR REPLACE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF NEW.text = 'contended' AND nextval('races') < 3 THEN "
            "RAISE EXCEPTION 'lost' USING ERRCODE = '40001'; END IF; RETURN NEW; END $$"
        ),
        "CREATE OR REPLACE TRIGGER lose BEFORE INSERT ON note FOR EACH ROW EXECUTE FUNCTION lose()",
    )
    with server().reader.begin() as connection:
        for statement in lose:
            connection.execute(text(statement))
    try:
        yield
    finally:
        with server().reader.begin() as connection:
            connection.execute(text("DROP FUNCTION lose CASCADE"))
            connection.execute(text("DROP SEQUENCE races"))


@in_the_table
@frameworks
@pytest.mark.parametrize("attempts", [2, 3])
async def test_a_lost_race_is_run_again(
    framework: Framework, pages: Pages, monkeypatch: pytest.MonkeyPatch, attempts: int
) -> None:
    """After a conflict the request runs again with the same body, and its last result is sent."""
    by_default(monkeypatch, attempts=attempts)
    async with serving(pages.load(framework)) as served:
        with contended_table():
            exchange = await served.ask("POST", "/notes", {"text": "contended"})
            assert stored() == (["contended"] if attempts == 3 else [])
    if attempts == 3:
        assert (exchange.status, exchange.error) == (201, None)
    else:
        assert exchange.status == 500 or isinstance(exchange.error, DBAPIError)


@in_the_table
@frameworks
async def test_a_full_pool_is_answered_503(
    framework: Framework, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that gets no connection in time is answered 503, with Retry-After."""
    by_default(monkeypatch, retry_after=2)
    loaded = pages.load(framework)
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    loaded.database._engine_options.update(options)
    async with serving(loaded) as served:
        engine: Any = served.database.engine
        async with engine.connect():
            exchange = await served.ask("POST", "/notes", {"text": "refused"})
        assert (exchange.status, exchange.error) == (503, None)
        assert (b"retry-after", b"2") in exchange.messages[0]["headers"]
        assert (await served.ask("POST", "/notes", {"text": "fine"})).status == 201
    assert stored() == ["fine"]
