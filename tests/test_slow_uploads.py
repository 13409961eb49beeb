"""Tests the page on slow uploads with clients that send a byte now and then, to a real server."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from asgi import get
from conftest import becomes_true, checked_out
from pages import Page
from test_guides import Guide, guide

from asgi_dbsession.live import LivePage

__all__ = ["guide"]
PAGE = Page("docs/how-to/slow-uploads.md")
CURE = "    await session.rollback()  # before the body: gives the connection back\n"
pytestmark = pytest.mark.anyio


def without_the_cure(folder: Path) -> None:
    """Write the page's file as one would write it at first."""
    code = PAGE.files()["uploads.py"]
    assert code.count(CURE) == 1
    (folder / "careless.py").write_text(code.replace(CURE, ""))


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[int]:
    """Serve with uvicorn; gives the port."""
    config = uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await becomes_true(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


async def connect(port: int, body: bytes = b"") -> tuple[asyncio.StreamReader, Any]:
    """Begin to upload four bytes, and send these of them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /files HTTP/1.1\r\nhost: test\r\nauthorization: secret\r\ncontent-length: 4\r\n\r\n"
    )
    writer.write(head.encode() + body)
    return reader, writer


async def status(reader: asyncio.StreamReader) -> int:
    return int((await reader.readline()).split()[1])


async def test_slow_clients_hold_no_connection(guide: Guide) -> None:
    """Twenty of them wait with their bodies, and ten others are served; then the twenty too."""
    uploads = guide.load(PAGE, "uploads")
    guide.execute("INSERT INTO person VALUES ('ann', 'secret')")
    async with served(uploads.app) as port:
        slow = [await connect(port, b"x") for _ in range(20)]
        await asyncio.sleep(0.5)
        assert checked_out(uploads.database) == 0
        for _ in range(10):
            reader, writer = await connect(port, b"fast")
            assert await status(reader) == 201
            writer.close()
        for _, writer in slow:
            writer.write(b"low")
        assert [await status(reader) for reader, _ in slow] == [201] * 20
        for _, writer in slow:
            writer.close()
    assert sorted(guide.stored("SELECT DISTINCT encode(content, 'escape') FROM file")) == [
        "fast",
        "xlow",
    ]


async def test_without_the_cure_five_clients_exhaust_the_pool_and_it_is_seen(
    guide: Guide, caplog: pytest.LogCaptureFixture
) -> None:
    """The sixth gets 503; the live page and the log show the line."""
    guide.load(PAGE, "uploads")
    guide.execute("INSERT INTO person VALUES ('ann', 'secret')")
    without_the_cure(guide.folder)
    careless: Any = import_module("careless")
    page = LivePage(careless.database, allow=lambda _: True)
    async with served(careless.app) as port:
        slow = [await connect(port) for _ in range(5)]
        await becomes_true(lambda: checked_out(careless.database) == 5)
        reader, writer = await connect(port, b"fast")
        assert await status(reader) == 503
        writer.close()
        shown = await get(page, "/json")
        assert shown.body.count(b'"idle"') >= 5
        assert b"careless.py:" in shown.body
        await asyncio.sleep(0.2)  # the 503 came after a second, perhaps less for the last
        with caplog.at_level(logging.WARNING, "asgi_dbsession"):
            for _, each in slow:
                each.close()
            await becomes_true(lambda: checked_out(careless.database) == 0)
    idle = [each for each in caplog.messages if "idle for" in each]
    assert len(idle) == 5
    assert all(each.startswith("POST /files held") for each in idle)
    (between,) = re.findall(r"between uploads(.py:\d+ and [^.]+\.)", PAGE.text)
    assert all(f"careless{between}" in each for each in idle)
