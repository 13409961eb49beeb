"""The MCP Python SDK: what the result of a tool says is stored, over both of its transports."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import becomes_true, checked_out
from library import STORES, Library, library, served
from mcp import Client
from mcp.client.sse import sse_client
from mcp.client.stdio import StdioServerParameters, stdio_client
from pages import Page

from asgi_dbsession import SessionClosed, get_session
from asgi_dbsession.asgi.optional import events

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/mcp.md")
LINES = "SELECT text FROM line"
TRANSPORTS = ("streamable HTTP", "SSE")


@pytest.fixture(params=STORES)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Library]:
    """The files of the page."""
    with library(PAGE, request.param, tmp_path) as found:
        yield found


transports = pytest.mark.parametrize("transport", TRANSPORTS)


@asynccontextmanager
async def connected(module: Any, transport: str, mode: str = "auto") -> AsyncIterator[Any]:
    """An agent, connected to a real server."""
    app = module.sse if transport == "SSE" else module.app
    async with served(app, module.database) as host:
        url = f"http://{host}/" + ("sse" if transport == "SSE" else "mcp")
        server: Any = sse_client(url) if transport == "SSE" else url
        options: Any = {"mode": mode}
        async with Client(server, **options) as client:
            yield client


@transports
async def test_a_result_says_what_is_stored(page: Library, transport: str) -> None:
    """Many calls run at once; each client finds its row in the database when its result arrives."""
    module = page.load("tools")
    texts = [f"line {number}" for number in range(20)]
    missing: list[str] = []
    async with connected(module, transport) as client:

        async def add(line: str) -> None:
            result = await client.call_tool("add", {"text": line})
            assert not result.is_error
            if line not in page.stored(LINES):
                missing.append(line)

        await asyncio.gather(*map(add, texts))
        await becomes_true(lambda: checked_out(module.database) == 0)
        count = await client.read_resource("lines://count")
    assert missing == []
    assert page.stored(LINES) == sorted(texts)
    assert count.contents[0].text == "20"


@transports
async def test_a_tool_that_fails_stores_nothing(page: Library, transport: str) -> None:
    """The agent gets an error; the work of other tools at the same time is stored."""
    module = page.load("tools")
    async with connected(module, transport) as client:
        texts = ["one", "", "two"]
        results = await asyncio.gather(*(client.call_tool("add", {"text": each}) for each in texts))
    assert [each.is_error for each in results] == [False, True, False]
    assert page.stored(LINES) == ["one", "two"]


@transports
async def test_a_commit_that_fails_is_the_error_of_the_tool(tmp_path: Path, transport: str) -> None:
    """The agent is not told that its line was added."""
    with library(PAGE, "asyncpg", tmp_path) as page:
        module = page.load("tools")
        page.execute("ALTER TABLE line DROP CONSTRAINT line_text_key")
        page.execute("ALTER TABLE line ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED")
        async with connected(module, transport) as client:
            first = await client.call_tool("add", {"text": "one"})
            second = await client.call_tool("add", {"text": "one"})
        assert (first.is_error, second.is_error) == (False, True)
        assert page.stored(LINES) == ["one"]


async def test_mounted_in_fastapi_the_tools_are_the_same(page: Library) -> None:
    """The lifespan of FastAPI runs MCP's session manager, and the middleware is around both."""
    module, shop = page.load("tools"), page.load("shop")
    async with (
        served(shop.app, module.database) as host,
        Client(f"http://{host}/mcp/") as client,
    ):
        assert not (await client.call_tool("add", {"text": "one"})).is_error
        assert page.stored(LINES) == ["one"]


async def test_over_stdio_the_tools_are_the_same(page: Library, tmp_path: Path) -> None:
    """The script starts the database itself."""
    page.load("tools")
    script = StdioServerParameters(
        command=sys.executable, args=[str(tmp_path / "stdio.py")], env=dict(os.environ)
    )
    async with Client(stdio_client(script)) as client:
        assert not (await client.call_tool("add", {"text": "one"})).is_error
        assert page.stored(LINES) == ["one"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package logged."""
    return [each.getMessage() for each in caplog.records if each.name == "asgi_dbsession"]


async def test_a_session_of_streamable_http_is_the_same(
    page: Library, caplog: pytest.LogCaptureFixture
) -> None:
    """The older mode of the protocol, where the server keeps a session per agent, works too."""
    module = page.load("tools")
    async with connected(module, "streamable HTTP", "legacy") as client:
        result = await client.call_tool("add", {"text": "one"})
        assert not result.is_error
        assert page.stored(LINES) == ["one"]
        assert (await client.call_tool("add", {"text": ""})).is_error
    assert page.stored(LINES) == ["one"]
    assert warnings(caplog) == []


async def test_without_begin_a_result_may_promise_what_commit_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page uses `begin()`. Without it, the result comes before COMMIT, and a line says so."""
    monkeypatch.setattr(events, "_warned", set())
    with library(PAGE, "asyncpg", tmp_path) as page:
        module = page.load("tools")
        page.execute("ALTER TABLE line DROP CONSTRAINT line_text_key")
        page.execute("ALTER TABLE line ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED")
        page.execute("INSERT INTO line (text) VALUES ('one')")

        @module.server.tool()  # type: ignore[untyped-decorator]
        async def careless(text: str) -> str:
            get_session().add(module.Line(text=text))
            await get_session().flush()
            return "stored"

        async with connected(module, "streamable HTTP", "legacy") as client:
            result = await client.call_tool("careless", {"text": "one"})
            await client.call_tool("careless", {"text": "two"})
        assert (result.is_error, result.content[0].text) == (False, "stored")
        assert page.stored(LINES) == ["one", "two"]
        (line,) = warnings(caplog)
        assert "`database.begin()`" in line
        assert "/mcp" in line


async def test_over_sse_a_session_without_begin_is_closed(page: Library) -> None:
    """The request that brought the call was answered before the tool runs."""
    module = page.load("tools")
    errors: list[BaseException] = []

    @module.server.tool()  # type: ignore[untyped-decorator]
    async def careless(text: str) -> str:
        await asyncio.sleep(0.05)
        try:
            get_session().add(module.Line(text=text))
        except SessionClosed as error:
            errors.append(error)
            raise
        return "stored"

    async with connected(module, "SSE") as client:
        assert (await client.call_tool("careless", {"text": "one"})).is_error
    assert "database.begin()" in str(errors[0])
    assert page.stored(LINES) == []
