"""The promises over a real socket, and how a real server stops."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import postgres
import pytest
from conftest import METADATA, Real, becomes_true
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

import asgi_dbsession

pytestmark = pytest.mark.anyio

SHOP = """
import asyncio
import os

from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

database = AsyncDatabase.from_env()


async def entries(request):
    rows = await get_session().scalars(text("SELECT note FROM entry ORDER BY id"))
    return JSONResponse(list(rows))


async def add(request):
    note = (await request.body()).decode()
    await get_session().execute(text("INSERT INTO entry (note) VALUES (:note)"), {"note": note})
    if note == "doomed":
        await get_session().execute(text("INSERT INTO child (entry_id) VALUES (-1)"))
    if note == "slow":
        await get_session().execute(text("SELECT pg_sleep(0.5)"))
    return PlainTextResponse("stored", 201)


async def stream(request):
    async def parts():
        while True:
            await get_session().execute(text("INSERT INTO entry (note) VALUES (NULL)"))
            yield b"part"
            await asyncio.sleep(0.01)

    return StreamingResponse(parts())


async def status(request):
    return JSONResponse({"held": database.engine.pool.checkedout(), "pid": os.getpid()})


app = Starlette(
    routes=[
        Route("/", entries),
        Route("/", add, methods=["POST"]),
        Route("/stream", stream),
        Route("/status", status),
    ],
    middleware=[Middleware(DBSessionMiddleware, database)],
)
"""
BARE = """
async def app(scope, receive, send):
    assert scope["type"] == "lifespan"
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
"""


class Server:
    """uvicorn in a process of its own, on a port of its own choice.

    Args:
        folder: Where `shop.py` is, and what it prints goes.
        url: The `DATABASE_URL` it gets.
        options: More arguments on its command line.
    """

    def __init__(self, folder: Path, url: str, *options: str) -> None:
        self._printed = folder / "printed.txt"
        command = [sys.executable, "-m", "uvicorn", "shop:app", "--port", "0", *options]
        package = Path(asgi_dbsession.__file__).parents[1]
        with self._printed.open("wb") as printed:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | {"DATABASE_URL": url, "PYTHONPATH": str(package)},
                stdout=printed,
                stderr=subprocess.STDOUT,
            )

    @property
    def printed(self) -> str:
        """All that it printed so far."""
        return self._printed.read_text()

    @property
    def url(self) -> str:
        """Where it listens; empty until it does."""
        found = re.search(r"running on (http://[\d.]+:\d+)", self.printed)
        return found.group(1) if found else ""

    async def serving(self, processes: int = 1) -> "Server":
        """Wait until each of its processes serves."""
        await becomes_true(lambda: self._serves(processes) or self.process.poll() is not None, 30)
        assert self.process.poll() is None, self.printed
        return self

    def _serves(self, processes: int) -> bool:
        started = self.printed.count("Application startup complete.")
        return bool(self.url) and started >= processes

    def get(self, path: str = "/") -> httpx2.Response:
        """Ask it for something, on a connection of its own."""
        return httpx2.get(self.url + path)

    def add(self, note: str) -> httpx2.Response:
        """Have it store a row."""
        return httpx2.post(self.url, content=note)

    def pid(self) -> int:
        """The process that answers; 0 while none does."""
        try:
            return int(self.get("/status").json()["pid"])
        except httpx2.TransportError:
            return 0

    def stop(self) -> int:
        """Send SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


class Shop:
    """A small application in a file, its database, and servers for it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "shop.py"
        self.file.write_text(SHOP)
        url = postgres.new_database("uvicorn")
        reader = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
        METADATA.create_all(reader)
        self.real = Real("asyncpg", url, reader)
        self.servers: list[Server] = []

    def start(self, *options: str, url: str | None = None) -> Server:
        """Start a server, on the shop's own database unless told otherwise."""
        url = url or self.real.url.render_as_string(hide_password=False)
        self.servers.append(Server(self.file.parent, url, *options))
        return self.servers[-1]


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """A shop whose servers do not outlive the test."""
    shop = Shop(tmp_path)
    yield shop
    for server in shop.servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


WAYS = pytest.mark.parametrize(
    "options", [(), ("--workers", "2"), ("--reload", "--reload-delay", "0.05")], ids=" ".join
)


def processes(options: tuple[str, ...]) -> int:
    """How many processes serve."""
    return 2 if "--workers" in options else 1


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_what_was_acknowledged_over_a_socket_is_stored(shop: Shop, driver: str) -> None:
    """And read back in the next request; nothing is held between the two."""
    url = shop.real.url.set(drivername=f"postgresql+{driver}")
    server = await shop.start(url=url.render_as_string(hide_password=False)).serving()
    assert server.get().json() == []
    assert server.add("one").status_code == 201
    assert shop.real.stored() == ["one"]
    assert server.get().json() == ["one"]
    assert server.get("/status").json()["held"] == 0
    assert shop.real.open_transactions() == 0


@WAYS
async def test_a_server_that_is_stopped_leaves_no_connection(
    shop: Shop, options: tuple[str, ...]
) -> None:
    """It exits exactly as it does without the middleware, and prints no traceback."""
    server = await shop.start(*options).serving(processes(options))
    for number in range(4):
        assert server.add(f"row {number}").status_code == 201
    assert shop.real.connections() >= processes(options)
    status = server.stop()
    await becomes_true(lambda: shop.real.connections() == 0)
    assert "Traceback" not in server.printed
    assert "appears unsupported" not in server.printed
    assert server.printed.count("Application shutdown complete.") == processes(options)
    assert len(shop.real.stored()) == 4
    shop.file.write_text(BARE)
    assert (await shop.start(*options).serving(processes(options))).stop() == status


async def test_a_server_that_is_stopped_in_the_middle_of_a_request_stores_it_first(
    shop: Shop,
) -> None:
    """The engine is stopped after the last response, not under it."""
    statuses = []
    server = await shop.start().serving()
    request = threading.Thread(target=lambda: statuses.append(server.add("slow").status_code))
    request.start()
    await becomes_true(lambda: shop.real.open_transactions() == 1)
    server.stop()
    request.join()
    assert statuses == [201]
    assert shop.real.stored() == ["slow"]
    await becomes_true(lambda: shop.real.connections() == 0)


async def test_a_server_that_reloads_leaves_no_connection_of_its_former_self(shop: Shop) -> None:
    """Neither after a change of a file nor after the end."""
    server = await shop.start("--reload", "--reload-delay", "0.05").serving()
    assert server.add("before").status_code == 201
    former = server.pid()
    changed = shop.file.stat().st_mtime + 10
    os.utime(shop.file, (changed, changed))
    await becomes_true(lambda: server.pid() not in (0, former), seconds=30)
    await becomes_true(lambda: shop.real.connections() <= 1)  # the new one's
    assert server.add("after").status_code == 201
    server.stop()
    await becomes_true(lambda: shop.real.connections() == 0)
    assert shop.real.stored() == ["before", "after"]


async def test_a_failed_commit_is_a_500_over_a_socket_too(shop: Shop) -> None:
    """Nothing of it is stored, and the server goes on."""
    server = await shop.start().serving()
    response = server.add("doomed")
    assert response.status_code == 500
    assert "stored" not in response.text
    assert shop.real.stored() == []
    await becomes_true(lambda: "ForeignKeyViolation" in server.printed)
    assert server.get("/status").json()["held"] == 0
    assert server.add("fine").status_code == 201
    assert shop.real.stored() == ["fine"]


async def test_a_client_that_hangs_up_in_a_stream_leaves_nothing_checked_out(shop: Shop) -> None:
    """What the stream was about to store is gone, and its connection is back in the pool."""
    server = await shop.start().serving()
    with httpx2.stream("GET", server.url + "/stream") as response:
        parts = response.iter_raw()  # kept: its end is the end of the response
        assert next(parts).startswith(b"part")
        assert server.get("/status").json()["held"] == 1
    await becomes_true(lambda: server.get("/status").json()["held"] == 0)
    await becomes_true(lambda: shop.real.open_transactions() == 0)
    assert shop.real.stored() == []
    assert server.add("fine").status_code == 201


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_server_without_its_database_exits_and_says_why(shop: Shop, driver: str) -> None:
    """Not zero, one line, no traceback, and no password."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        server = shop.start(url=f"postgresql+{driver}://app:hush@{address}/shop")
        await becomes_true(lambda: server.process.poll() is not None, seconds=20)
    assert server.process.returncode > 0
    assert "Traceback" not in server.printed
    assert "hush" not in server.printed
    (line,) = [each for each in server.printed.splitlines() if address in each]
    assert line.endswith("are host, port, name and credentials right?")
