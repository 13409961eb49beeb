"""Tests the how-to pages on streams, sockets, background work and deployment."""

import asyncio
import importlib
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import postgres
import pytest
from asgi import Exchange, Life, Message, Socket, get
from conftest import becomes_true, checked_out, postgresql
from fastapi import BackgroundTasks, Depends, FastAPI, Response
from pages import Page
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.pool import NullPool

from asgi_dbsession import AsyncDatabase

WHY = Page("docs/explanation/concepts.md")
STREAMING = Page("docs/how-to/streaming.md")
BACKGROUND = Page("docs/how-to/background-work.md")
WEBSOCKETS = Page("docs/how-to/websockets.md")
DEPLOYMENT = Page("docs/how-to/deployment.md")

pytestmark = pytest.mark.anyio


class Guide:
    """Imports the files of pages, with an empty database for their tables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reader: Engine = postgresql("guides")[1]
        self._modules: list[Any] = []

    def load(self, page: Page, name: str) -> Any:
        """Import one of the files that a page shows."""
        for file, code in page.files().items():
            if file:
                (self.folder / file).write_text(code)
        importlib.invalidate_caches()
        module = importlib.import_module(name)
        if hasattr(module, "Base"):
            module.Base.metadata.create_all(self.reader)
            self._modules.append(module)
        return module

    def stored(self, query: str) -> list[Any]:
        """Return the first column of the stored rows."""
        with self.reader.connect() as connection:
            return list(connection.scalars(text(query)))

    def execute(self, statement: str) -> None:
        """Store a row over another connection."""
        with self.reader.begin() as connection:
            connection.execute(text(statement))

    def close(self) -> None:
        """Forget modules and tables."""
        for module in self._modules:
            module.Base.metadata.drop_all(self.reader)
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(str(self.folder)):
                del sys.modules[name]


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guide]:
    """A folder to import from, and `DATABASE_URL` of a PostgreSQL database."""
    url = postgresql("guides")[0].set(drivername="postgresql+asyncpg")
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = Guide(tmp_path)
    yield found
    found.close()


@asynccontextmanager
async def alive(app: Any) -> AsyncIterator[None]:
    """Run the lifespan of an application around the block."""
    life = await Life(app).startup()
    assert life.messages == [{"type": "lifespan.startup.complete"}]
    yield
    await life.shutdown()
    assert life.error is None


# Concepts: before the first byte


def trace(engine: Engine, seen: list[str]) -> None:
    """Record the checkouts and returns of an engine's connections."""
    event.listen(engine, "checkout", lambda *_: seen.append("checkout"))
    event.listen(engine, "checkin", lambda *_: seen.append("checkin"))
    event.listen(engine, "commit", lambda _: seen.append("COMMIT"))


@pytest.mark.parametrize("name", ["with_the_middleware", "with_a_dependency"])
async def test_the_picture_shows_what_happens(guide: Guide, name: str) -> None:
    """The order of the events is the order that the page shows below each application."""
    (guide.folder / "notes.db").touch()
    reader = create_engine("sqlite:///notes.db", poolclass=NullPool)
    with reader.begin() as connection:
        connection.execute(text("CREATE TABLE note (text TEXT)"))
    module = guide.load(WHY, name)
    seen: list[str] = []

    def note(message: Message) -> None:
        if message["type"] == "http.response.start":
            seen.append("first byte")
        elif not message.get("more_body"):
            seen.append("last byte")

    async with alive(module.app):
        database = getattr(module, "database", module)
        trace(database.engine.sync_engine, seen)
        await get(module.app, "/notes", method="POST", on_message=note)
        order = WHY.blocks("text")[name == "with_a_dependency"]
        assert ", ".join(seen) == order.strip()
    if database is module:
        await module.engine.dispose()
    with reader.connect() as connection:
        assert list(connection.scalars(text("SELECT text FROM note"))) == ["now", "later"]


async def test_a_dependency_that_ends_before_the_response_ends_too_early(guide: Guide) -> None:
    """With `scope="function"`, refused work is stored and later work is lost."""
    reader = create_engine("sqlite:///notes.db", poolclass=NullPool)
    with reader.begin() as connection:
        connection.execute(text("CREATE TABLE note (text TEXT)"))
    module = guide.load(WHY, "with_a_dependency")
    session_class = Annotated[
        AsyncSession, Depends(module.session_of_the_request, scope="function")
    ]
    app = FastAPI()
    insert = "INSERT INTO note VALUES (:text)"

    @app.post("/refused")
    async def refused(session: session_class) -> Response:
        await session.execute(text(insert), {"text": "refused"})
        return Response(status_code=409)

    async def later(session: AsyncSession) -> None:
        await session.execute(text(insert), {"text": "later"})
        assert session.in_transaction()
        await session.close()  # otherwise the test would have to wait for the garbage collector

    @app.post("/background")
    async def background(session: session_class, tasks: BackgroundTasks) -> None:
        tasks.add_task(later, session)

    assert (await get(app, "/refused", method="POST")).status == 409
    assert (await get(app, "/background", method="POST")).error is None
    with reader.connect() as connection:
        assert list(connection.scalars(text("SELECT text FROM note"))) == ["refused"]
    await module.engine.dispose()


# Frameworks


@pytest.mark.parametrize("framework", ["fastapi", "starlette"])
async def test_the_first_request_is_answered_as_shown(guide: Guide, framework: str) -> None:
    """The curl request below the application gets the answer below it."""
    page = Page(f"docs/how-to/{framework}.md")
    module = guide.load(page, "notes")
    async with alive(module.app):
        for command, answer in page.answers():
            path, content = re.fullmatch(  # type: ignore[union-attr]
                r"curl localhost:8000(\S+) -H 'content-type: application/json' +-d '(.*)'", command
            ).groups()
            exchange = await get(module.app, path, method="POST", content=content.encode())
            assert (exchange.status, exchange.body.decode()) == (201, answer)


# Stream a response


def measure(guide: Guide, number: int) -> str:
    """Store so many rows, and return the export of them."""
    guide.execute(
        f"INSERT INTO measure SELECT n, 'value ' || n FROM generate_series(1, {number}) AS n"
    )
    return "".join(f"{n},value {n}\n" for n in range(1, number + 1))


@pytest.mark.parametrize(("path", "held"), [("/export", {0}), ("/snapshot", {0, 1})])
async def test_an_export_holds_what_the_page_says(guide: Guide, path: str, held: set[int]) -> None:
    """Page by page, no connection is in use while the client reads; a snapshot needs one."""
    module = guide.load(STREAMING, "measures")
    export = measure(guide, 2500)
    seen = set()
    async with alive(module.app):

        def look(message: Message) -> None:
            seen.add(checked_out(module.database))

        exchange = await get(module.app, path, on_message=look)
        assert exchange.body.decode() == export
        assert seen == held
        assert checked_out(module.database) == 0


async def test_listeners_hold_nothing_between_events(guide: Guide) -> None:
    """Many listeners on a small pool get each new item once."""
    module = guide.load(STREAMING, "measures")
    listeners = [Exchange(module.app, "/events") for _ in range(50)]
    async with alive(module.app):
        serving = [asyncio.create_task(each.run()) for each in listeners]
        for number in (1, 2):
            guide.execute(f"INSERT INTO measure VALUES ({number}, 'value {number}')")
            line = f"id: {number}\ndata: value {number}\n\n".encode()
            await becomes_true(lambda line=line: all(line in each.body for each in listeners))  # type: ignore[misc]
            await becomes_true(lambda: checked_out(module.database) == 0)
        for each in listeners:
            each.hang_up.set()
        await asyncio.gather(*serving)
    events = ": listening\n\n" + "".join(f"id: {n}\ndata: value {n}\n\n" for n in (1, 2))
    assert {each.body.decode() for each in listeners} == {events}


async def test_a_listener_that_reconnects_gets_only_new_events(guide: Guide) -> None:
    """The browser sends the `id` of the last event that it got."""
    module = guide.load(STREAMING, "measures")
    for number in (1, 2):
        guide.execute(f"INSERT INTO measure VALUES ({number}, 'value {number}')")
    again = Exchange(module.app, "/events")
    again.scope["headers"].append((b"last-event-id", b"1"))
    async with alive(module.app):
        serving = asyncio.create_task(again.run())
        await becomes_true(lambda: b"data:" in again.body)
        again.hang_up.set()
        await serving
    assert again.body.decode() == ": listening\n\nid: 2\ndata: value 2\n\n"


# Work in the background


async def test_a_background_task_finds_what_its_request_stored(guide: Guide) -> None:
    """The task holds no connection while it waits, and its work is stored at its end."""
    module = guide.load(BACKGROUND, "orders")
    seen = []

    async def look(_: str) -> None:
        state = guide.stored("SELECT state FROM orders")
        seen.append((state, checked_out(module.database)))

    module.send_mail = look
    async with alive(module.app):
        exchange = await get(module.app, "/orders", method="POST")
        assert exchange.status == 201
        assert seen == [(["new"], 0)]
        assert guide.stored("SELECT state FROM orders") == ["confirmed"]


async def test_a_task_outlives_its_request(guide: Guide) -> None:
    """The lifespan waits for the task, while the engine is still running."""
    module = guide.load(BACKGROUND, "orders")
    guide.execute("INSERT INTO orders VALUES (7, 'confirmed')")
    async with alive(module.app):
        exchange = await get(module.app, "/orders/7/ship", method="POST")
        assert (exchange.status, guide.stored("SELECT state FROM orders")) == (202, ["packing"])
    assert guide.stored("SELECT state FROM orders") == ["shipped"]


@pytest.mark.parametrize(
    ("state", "status", "after"),
    [("new", 200, (["cancelled"], {})), ("shipped", 409, (["shipped"], {7: "shown"}))],
)
async def test_a_cache_forgets_what_was_stored(
    guide: Guide, state: str, status: int, after: Any
) -> None:
    """The function runs before the response, and only if the work was stored."""
    module = guide.load(BACKGROUND, "orders")
    guide.execute(f"INSERT INTO orders VALUES (7, '{state}')")
    module.cache[7] = "shown"
    seen = []

    def look(_: Message) -> None:
        seen.append((guide.stored("SELECT state FROM orders"), dict(module.cache)))

    async with alive(module.app):
        exchange = await get(module.app, "/orders/7/cancel", method="POST", on_message=look)
    assert exchange.status == status
    assert seen[0] == after


async def test_workers_share_the_rows(guide: Guide) -> None:
    """Each job is done once, and a job that another worker has locked is skipped."""
    worker = guide.load(BACKGROUND, "worker")
    module = guide.load(BACKGROUND, "orders")
    guide.execute("INSERT INTO orders SELECT n, 'new' FROM generate_series(1, 4) AS n")
    with guide.reader.begin() as other:
        other.execute(text("SELECT * FROM orders WHERE id = 2 FOR UPDATE"))
        async with module.database:
            assert await asyncio.gather(*(worker.do_one() for _ in range(3))) == [True] * 3
            assert not await worker.do_one()
    assert guide.stored("SELECT state FROM orders ORDER BY id") == ["done", "new", "done", "done"]


# Use WebSockets


async def converse(app: Any, path: str, *texts: str) -> Socket:
    """Send a text, and close the socket."""
    socket = Socket(app, path)
    for each in texts:
        socket.say(each)
    socket.hang_up(1000)
    return await socket.run()


LINES = "SELECT text FROM line ORDER BY id"


async def test_a_chat_stores_before_it_says_so(guide: Guide) -> None:
    """Each text is stored before the client gets it; a second equal text closes the socket."""
    module = guide.load(WEBSOCKETS, "chat")
    async with alive(module.app):
        peer = await converse(module.app, "/chat", "one", "two", "one", "three")
    assert peer.heard == ["stored: one", "stored: two"]
    assert isinstance(peer.error, IntegrityError)
    assert guide.stored(LINES) == ["one", "two"]


async def test_a_patient_chat_keeps_its_socket(guide: Guide) -> None:
    """A handler that commits itself gets the error, and continues."""
    module = guide.load(WEBSOCKETS, "chat")
    async with alive(module.app):
        peer = await converse(module.app, "/patient", "one", "one", "two")
    assert peer.heard == ["stored: one", "refused: one", "stored: two"]
    assert peer.error is None
    assert guide.stored(LINES) == ["one", "two"]


async def test_two_tasks_on_one_socket(guide: Guide) -> None:
    """One task reads, and the other task writes all messages."""
    module = guide.load(WEBSOCKETS, "chat")
    guide.execute("INSERT INTO line VALUES (-1, 'unseen')")
    async with alive(module.app):
        socket = Socket(module.app, "/feed")
        serving = asyncio.create_task(socket.run())
        socket.say("said")
        await becomes_true(lambda: socket.heard == ["said"])
        guide.execute("INSERT INTO line VALUES (1000, 'from elsewhere')")
        await becomes_true(lambda: socket.heard == ["said", "from elsewhere"])
        socket.hang_up(1000)
        await serving
    assert socket.error is None


async def test_a_handler_of_quart_holds_nothing_between_messages(guide: Guide) -> None:
    """The handler commits itself; as the page says, otherwise it would hold its connection."""
    module = guide.load(WEBSOCKETS, "quart_chat")
    guide.load(WEBSOCKETS, "chat")
    async with alive(module.app):
        socket = Socket(module.app, "/diary")
        socket.scope["headers"] = [(b"host", b"test")]
        serving = asyncio.create_task(socket.run())
        socket.say("kept")
        await becomes_true(lambda: guide.stored(LINES) == ["kept"])
        await becomes_true(lambda: checked_out(module.database) == 0)
        socket.hang_up(1000)
        await serving


async def test_a_handler_of_quart_that_only_waits_commits_nothing(guide: Guide) -> None:
    """Quart waits for the socket in another task, so the page says that a handler should commit."""
    code = WEBSOCKETS.files()["quart_chat.py"]
    commit = "await get_session().commit()"
    assert commit in code
    flushing = code.replace(commit, "await get_session().flush()")
    guide.load(WEBSOCKETS, "chat")
    (guide.folder / "flushing.py").write_text(flushing)
    importlib.invalidate_caches()
    module = importlib.import_module("flushing")
    async with alive(module.app):
        socket = Socket(module.app, "/diary")
        serving = asyncio.create_task(socket.run())
        socket.say("held")
        await becomes_true(lambda: checked_out(module.database) == 1)
        await socket.waits.wait()
        assert guide.stored(LINES) == []
        socket.hang_up(1000)
        await serving
        assert checked_out(module.database) == 0


# Deployment


def test_the_arithmetic_is_right() -> None:
    """The commands that calculate give the right results."""
    lines = re.findall(r"^([-(\d].*) = ([\d.]+),", DEPLOYMENT.text, re.MULTILINE)
    assert len(lines) == 2
    for calculation, result in lines:
        assert eval(calculation) == float(result)


def described_with(url: str) -> AsyncDatabase:
    """Return the database in the code block with this URL."""
    (number,) = (number for number, block in enumerate(DEPLOYMENT.blocks()) if url in block)
    database = DEPLOYMENT.run(number)["shop"]
    assert isinstance(database, AsyncDatabase)
    return database


async def test_the_options_of_the_pool_are_taken() -> None:
    """Five connections, and no overflow."""
    pool: Any = described_with("postgresql+asyncpg://app@db/shop")._build_engine().pool
    assert (pool.size(), pool._max_overflow, pool.timeout()) == (5, 0, 0.5)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_the_host_that_accepts_writes_is_found(driver: str) -> None:
    """The options of the page, with a first host that does not answer."""
    described = described_with(f"postgresql+{driver}://app@/shop?host=")
    real = make_url(str(postgres.server().get_uri()))
    folder = real.query["host"]
    assert described.url.query["host"] == ("db1:5432", "db2:5432")
    hosts = ("127.0.0.1:1", f"{folder}:5432")
    url = described.url.set(username=real.username, database=real.database)
    options: dict[str, Any] = described._engine_options
    async with AsyncDatabase(url.update_query_dict({"host": hosts}), **options) as database:
        await database.ping()


async def calls(app: Any, number: int) -> list[bytes]:
    """Send several requests, as in one call of a serverless function."""
    return [(await get(app)).body for _ in range(number)]


def test_a_function_works_in_whatever_event_loop(guide: Guide) -> None:
    """Several calls, each in its own event loop, with no open connection between them."""
    others = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    before = guide.stored(others)  # The traceback of an earlier test may keep a connection.
    module = guide.load(DEPLOYMENT, "function")
    for _ in range(2):
        assert asyncio.run(calls(module.app, 2)) == [b"42", b"42"]
    # PostgreSQL ends the process of a closed connection a moment later.
    asyncio.run(becomes_true(lambda: guide.stored(others) <= before))
