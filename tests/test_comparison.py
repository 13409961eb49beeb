"""Runs each tool, and checks that the comparison page describes its behaviour correctly."""

import asyncio
import gc
import importlib
import re
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Annotated, Any, TypeAlias

import postgres
import pytest
from asgi import Exchange, Life, Socket
from conftest import becomes_true, forget_modules
from fastapi import Depends, WebSocket
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from pages import Page
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from starlette.background import BackgroundTask

from benchmarks.faults.ledger import SCHEMA
from benchmarks.faults.tools import TOOLS

PAGE = Page("docs/explanation/comparison.md")
# The names of the applications of `benchmarks.peers` on the page, without the Starlette variants.
NAMES = {name: title for name, title in TOOLS.items() if not name.endswith("_http")}
INSERT = text("INSERT INTO entry VALUES (:number)")
COUNT = text("SELECT count(*) FROM entry WHERE number = :number")

pytestmark = pytest.mark.anyio
Handler: TypeAlias = Callable[[AsyncSession], Awaitable[Response]]


class Peer:
    """The application of `benchmarks.peers` that is written with one tool, being served."""

    def __init__(self, name: str, module: ModuleType, reader: Engine) -> None:
        self.name = name
        self.module: Any = module
        self._reader = reader

    @property
    def held(self) -> int:
        """Return how many connections are checked out of the pool."""
        return int(self.module.pool().checkedout())

    async def session(self, given: AsyncSession | None = None) -> AsyncSession:
        """Return the session of the request in the tool's own way, if it has one for any code."""
        found: Any = given
        if self.name == "asgi_dbsession":
            found = self.module.get_session()
        elif self.name == "fastapi_async_sqlalchemy":
            found = self.module.db.session
        elif self.name.startswith("context_async_sqlalchemy"):
            found = await self.module.db_session(self.module.connection)
        assert isinstance(found, AsyncSession)
        return found

    @property
    def parameter(self) -> Any:
        """Return the parameter that a handler declares to get the session."""
        if self.name == "fastapi_sqla":
            return self.module.AsyncSession
        if hasattr(self.module, "Database"):
            return self.module.Database

        async def session() -> AsyncSession:
            return await self.session()

        return Annotated[AsyncSession, Depends(session)]

    async def ask(self, path: str, method: str = "POST", **options: Any) -> Exchange:
        """Send a request in a task of its own, as a server does."""
        path, _, query = path.partition("?")
        exchange = Exchange(self.module.app, path, method=method, **options)
        exchange.scope["query_string"] = query.encode()
        await asyncio.create_task(exchange.run())
        return exchange

    async def answer(self, handler: Handler, **options: Any) -> Exchange:
        """Send a request to a handler that runs this function with its session."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.module.work, "insert", handler)
            return await self.ask("/insert", **options)

    def stored(self, number: int) -> bool:
        """Return True if the row is stored."""
        with self._reader.connect() as connection:
            return bool(connection.scalar(COUNT, {"number": number}))


Probe: TypeAlias = Callable[[Peer], Awaitable[str]]


async def moment_of_commit(peer: Peer) -> str:
    """Return the position of COMMIT among the messages of a response."""
    seen: list[str] = []

    def commit(_: Any) -> None:
        seen.append("COMMIT")

    event.listen(Engine, "commit", commit)
    try:
        await peer.ask("/insert", on_message=lambda message: seen.append(message["type"]))
    finally:
        event.remove(Engine, "commit", commit)
    return "before" if seen[0] == "COMMIT" else "**after**"


async def failed_commit(peer: Peer) -> str:
    """Return the status if a foreign key fails, which only COMMIT checks."""
    return _told((await peer.ask("/entries/1?then=failing%20commit")).status, peer.stored(1))


async def swallowed_error(peer: Peer) -> str:
    """Return the status if a handler continues after a failed statement."""
    return _told((await peer.ask("/entries/2?then=swallow")).status, peer.stored(2))


def _told(status: int | None, stored: bool) -> str:
    told = status or 500  # a server answers an exception with a 500
    return f"{told}" if (told < 400) is stored else f"**{told}**"


async def raised_409(peer: Peer) -> str:
    """Return if the row is stored when FastAPI answers an exception."""
    assert (await peer.ask("/entries/3?then=refuse")).status == 409
    return "stored" if peer.stored(3) else "rolled back"


async def returned_409(peer: Peer) -> str:
    """Return if the row is stored when the handler returns an error response."""

    async def refuse(session: AsyncSession) -> Response:
        await session.execute(INSERT, {"number": 4})
        return Response(status_code=409)

    assert (await peer.answer(refuse)).status == 409
    return "stored" if peer.stored(4) else "rolled back"


async def sessions_for_nothing(peer: Peer) -> str:
    """Return how many sessions are made for a handler that uses none."""
    made: list[Session] = []
    begin = Session.__init__

    def count(self: Session, *args: Any, **options: Any) -> None:
        made.append(self)
        begin(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", count)
        assert (await peer.ask("/nothing", "GET")).status == 200
    return str(len(made))


async def held_by_a_reader(peer: Peer) -> str:
    """Return the largest number of connections in use while a download is sent."""
    held: list[int] = []
    exchange = await peer.ask("/download", "GET", on_message=lambda _: held.append(peer.held))
    assert exchange.status == 200
    return _emphasised(max(held))


def _emphasised(held: int) -> str:
    return f"**{held}**" if held else "0"


def of_a_session(probe: Probe) -> Probe:
    """Ask only applications in which a request has a session; hand-written code opens its own."""

    async def probe_a_session(peer: Peer) -> str:
        return "\N{EN DASH}" if peer.name == "by_hand" else await probe(peer)

    return probe_a_session


@of_a_session
async def streamed(peer: Peer) -> str:
    """Return if rows are stored that a streaming body writes with the session of the request."""

    async def stream(given: AsyncSession) -> Response:
        await given.execute(text("SELECT 1"))

        async def parts() -> AsyncIterator[bytes]:
            yield b"first,"
            session = await peer.session(given)
            await session.execute(INSERT, {"number": 5})
            yield b"second"

        return StreamingResponse(parts())

    exchange = await peer.answer(stream)
    return _outcome(peer, 5, exchange.error)


@of_a_session
async def in_background(peer: Peer) -> str:
    """Return if rows are stored that a background task writes with the session of the request."""
    errors: list[Exception] = []

    async def schedule(given: AsyncSession) -> Response:
        await given.execute(text("SELECT 1"))

        async def write() -> None:
            try:
                session = await peer.session(given)
                await session.execute(INSERT, {"number": 6})
            except Exception as error:
                errors.append(error)
                raise

        return PlainTextResponse("later", background=BackgroundTask(write))

    await peer.answer(schedule)
    return _outcome(peer, 6, *errors)


def _outcome(peer: Peer, number: int, *errors: BaseException | None) -> str:
    if any(errors):
        assert not peer.stored(number)
        return "refused"
    if peer.stored(number):
        return "stored"
    return "**lost**, and leaked" if peer.held else "**lost**"


@of_a_session
async def held_by_a_socket(peer: Peer) -> str:
    """Return how many connections are in use while a WebSocket waits after a write."""
    app = peer.module.app

    async def talk(socket: WebSocket, session: peer.parameter) -> None:  # type: ignore[name-defined]
        await socket.accept()
        async for _ in socket.iter_text():
            await session.execute(INSERT, {"number": 7})
            await socket.send_text("done")

    app.add_api_websocket_route("/socket", talk)
    socket = Socket(app, "/socket")
    socket.say("write")
    serving = asyncio.create_task(socket.run())
    await becomes_true(lambda: socket.heard == ["done"] or serving.done())
    if serving.done():
        return "no session"
    await socket.waits.wait()
    held = _emphasised(peer.held)
    socket.hang_up(1000)
    await serving
    return held


PROBES: dict[str, Probe] = {
    "COMMIT and the first byte": moment_of_commit,
    "answer when COMMIT fails": failed_commit,
    "answer after a swallowed error": swallowed_error,
    "`HTTPException(409)`": raised_409,
    "a returned 409": returned_409,
    "sessions made for nothing": sessions_for_nothing,
    "held while the client reads": held_by_a_reader,
    "held while a WebSocket waits": held_by_a_socket,
    "a streaming body writes": streamed,
    "a background task writes": in_background,
}


def claims() -> dict[str, dict[str, str]]:
    """Return what the page says of each tool, from all tables with a tested column."""
    found: dict[str, dict[str, str]] = {}
    for table in re.findall(r"(?:^\|.*\|\n)+", PAGE.text, re.MULTILINE):
        first, _, *rows = [
            [cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()
        ]
        for row in rows:
            cells = zip(first[1:], row[1:], strict=True)
            found.setdefault(row[0].strip("*"), {}).update(
                {name: cell for name, cell in cells if name in PROBES}
            )
    return {tool: cells for tool, cells in found.items() if cells}


@pytest.fixture(scope="module")
def reader() -> Engine:
    """Another connection to the database of all tools."""
    url = postgres.new_database("comparison").set(drivername="postgresql+psycopg")
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(SCHEMA)
    return engine


@pytest.fixture
def module(
    tool: str, reader: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[ModuleType]:
    """Import the application of one tool again."""
    package = tool.removesuffix("_asgi")
    if not (package.startswith(("depends", "by_hand")) or find_spec(package)):
        pytest.skip(f"{NAMES[tool]} is not installed: see benchmarks/requirements.txt")
    with reader.begin() as connection:
        connection.execute(text("TRUNCATE entry, line, doomed"))
    url = reader.url.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
    monkeypatch.setenv("DATABASE_URL", url)
    with warnings.catch_warnings():
        # Garbage collection of objects that some tools leave behind.
        warnings.simplefilter("ignore")
        yield importlib.import_module(f"benchmarks.peers.{tool}")
        gc.collect()
    if tool != "asgi_dbsession":
        caplog.get_records("call").clear()
        caplog.clear()  # garbage collection of objects that some tools leave behind
    # One tool allows one engine per process, and tests of other tools run in this process too.
    forget_modules("benchmarks.peers", "fastapi_async_sqlalchemy")


@pytest.mark.parametrize("tool", NAMES)
async def test_each_cell_is_what_a_run_finds(tool: str, module: ModuleType, reader: Engine) -> None:
    """Each tool is asked in an application that follows the tool's own documentation."""
    found = {}
    for name, probe in PROBES.items():
        life = await Life(module.app).startup()
        found[name] = await probe(Peer(tool, module, reader))
        gc.collect()  # frees the connections that a tool leaves behind
        await life.shutdown()
    assert claims()[NAMES[tool]] == found
