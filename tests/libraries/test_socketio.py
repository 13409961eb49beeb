"""python-socketio: each event is a unit of work, over WebSocket and over polling."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import socketio  # type: ignore[import-untyped]
from conftest import becomes_true
from fastapi import FastAPI
from library import STORES, Library, library, served
from pages import Page

from asgi_dbsession import DBSessionMiddleware, SessionClosed, get_session

pytestmark = [
    pytest.mark.anyio,
    # python-socketio's client uses aiohttp, which leaves these to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

PAGE = Page("docs/how-to/socketio.md")
LINES = "SELECT text FROM line WHERE text NOT LIKE '% has %'"
GUESTS = "SELECT text FROM line WHERE text LIKE '% has joined'"
TRANSPORTS = [["websocket"], ["polling"], ["polling", "websocket"]]


@pytest.fixture(params=STORES)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Library]:
    """The files of the page."""
    with library(PAGE, request.param, tmp_path) as found:
        yield found


def board(page: Library) -> Any:
    """The application, set up to notice disconnected polling clients quickly."""
    module = page.load("board")
    module.sio.eio.ping_interval, module.sio.eio.ping_timeout = 0.1, 1
    return module


transports = pytest.mark.parametrize("transports", TRANSPORTS, ids="+".join)


@asynccontextmanager
async def connected(
    host: str, transports: list[str], name: str | None = "me"
) -> AsyncIterator[Any]:
    """A client, which disconnects at the end; without a name, it sends no `auth`."""
    client = socketio.AsyncClient(reconnection=False)
    auth = {"name": name} if name else None
    refusals: list[Any] = []
    client.on("connect_error", refusals.append)
    try:
        await client.connect(f"http://{host}", auth=auth, transports=transports)
    except socketio.exceptions.ConnectionError as error:
        error.add_note(str(refusals))
        raise
    try:
        yield client
    finally:
        await client.disconnect()


@transports
async def test_what_is_acknowledged_is_stored(page: Library, transports: list[str]) -> None:
    """Also with many events of one client at the same time."""
    module = board(page)
    texts = [f"line {number}" for number in range(10)]
    missing: list[str] = []

    async with served(module.app, module.database) as host:
        async with connected(host, transports) as client:

            async def write(line: str) -> None:
                await client.call("write", line, timeout=10)
                if line not in page.stored(LINES):
                    missing.append(line)

            await asyncio.gather(*map(write, texts))
            assert len(page.stored(GUESTS)) == 1
        assert missing == []
        assert page.stored(LINES) == sorted(texts)
        await becomes_true(lambda: len(page.stored("SELECT text FROM line")) == len(texts) + 2)


@transports
async def test_a_handler_that_fails_stores_and_acknowledges_nothing(
    page: Library, transports: list[str]
) -> None:
    """The client gets neither an answer nor a broadcast; its other events are stored."""
    module = board(page)
    if page.reader.dialect.name == "postgresql":  # only COMMIT refuses this work
        page.execute("ALTER TABLE line DROP CONSTRAINT line_text_key")
        page.execute("ALTER TABLE line ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED")
    # python-socketio passes the error of a handler to the event loop.
    asyncio.get_running_loop().set_exception_handler(lambda _, __: None)
    heard: list[str] = []
    async with served(module.app, module.database) as host:
        async with connected(host, transports) as client:
            client.on("written", heard.append)
            await client.call("write", "one", timeout=10)
            failing = asyncio.create_task(client.call("write", "one", timeout=0.5))
            await client.call("write", "two", timeout=10)
            with pytest.raises(socketio.exceptions.TimeoutError):
                await failing
        assert page.stored(LINES) == ["one", "two"]
        assert sorted(heard) == ["one", "two"]


@transports
async def test_a_refused_connection_stores_nothing(page: Library, transports: list[str]) -> None:
    """The work of `connect` is rolled back when `connect` refuses the connection."""
    module = board(page)
    async with served(module.app, module.database) as host:
        with pytest.raises(socketio.exceptions.ConnectionError) as refused:
            async with connected(host, transports, None):
                pytest.fail("it was connected")
        assert "Who are you?" in refused.value.__notes__[0]
        assert page.stored("SELECT text FROM line") == []


@transports
async def test_an_error_that_is_caught_outside_is_answered(
    page: Library, transports: list[str]
) -> None:
    """The work of the failed transaction is not stored, and the client gets an answer."""
    module = board(page)
    async with (
        served(module.app, module.database) as host,
        connected(host, transports) as client,
    ):
        assert await client.call("write_once", "one", timeout=10) == {"id": 2}
        refused = await client.call("write_once", "one", timeout=10)
        assert refused == {"error": "This line exists."}
        assert page.stored(LINES) == ["one"]


async def test_next_to_another_application_one_middleware_serves_both(page: Library) -> None:
    """The middleware is around both; the lifespan of the other application runs."""
    module = board(page)
    started: list[Any] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        started.append(module.database.engine)
        yield

    fastapi_app = FastAPI(lifespan=lifespan)

    @fastapi_app.post("/lines")
    async def post(line: str) -> None:
        get_session().add(module.Line(text=line))

    app = DBSessionMiddleware(socketio.ASGIApp(module.sio, fastapi_app), module.database)
    async with (
        served(app, module.database) as host,
        connected(host, ["websocket"]) as client,
        httpx2.AsyncClient() as http,
    ):
        assert started
        await client.call("write", "one", timeout=10)
        assert (await http.post(f"http://{host}/lines?line=two")).status_code == 200
        assert page.stored(LINES) == ["one", "two"]


async def test_a_connect_that_returns_false_is_committed(page: Library) -> None:
    """The page says to raise instead."""
    module = board(page)

    @module.sio.event  # type: ignore[untyped-decorator]
    @module.database.begin()  # type: ignore[untyped-decorator]
    async def connect(sid: str, environ: Any, auth: Any) -> bool:
        get_session().add(module.Line(text="refused"))
        return False

    async with served(module.app, module.database) as host:
        with pytest.raises(socketio.exceptions.ConnectionError):
            async with connected(host, ["websocket"]):
                pytest.fail("it was connected")
        assert page.stored("SELECT text FROM line") == ["refused"]


async def test_a_broadcast_is_stored_when_it_arrives(page: Library) -> None:
    """A client that receives a line finds this line in the database."""
    module = board(page)
    missing: list[str] = []
    heard: list[str] = []

    def look(line: str) -> None:
        heard.append(line)
        if line not in page.stored(LINES):
            missing.append(line)

    async with (
        served(module.app, module.database) as host,
        connected(host, ["websocket"], "writer") as writer,
        connected(host, ["polling"], "reader") as reader,
    ):
        reader.on("written", look)
        for number in range(10):
            await writer.emit("write", f"line {number}")
        await becomes_true(lambda: len(heard) == 10)
    assert missing == []


async def test_over_polling_the_session_of_the_request_is_closed(
    page: Library,
) -> None:
    """A handler without `begin()` runs when the request that brought its event has ended."""
    module = board(page)
    errors: list[BaseException] = []

    async def late(sid: str) -> None:
        await asyncio.sleep(0.1)
        try:
            get_session().add(module.Line(text="late"))
        except SessionClosed as error:
            errors.append(error)

    module.sio.on("late", late)
    async with (
        served(module.app, module.database) as host,
        connected(host, ["polling"]) as client,
    ):
        await client.emit("late")
        await becomes_true(lambda: bool(errors))
    assert "database.begin()" in str(errors[0])
    assert page.stored(LINES) == []
