"""Real servers in processes of their own: how each is run, and what it says."""

import atexit
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import postgres
from conftest import CHILD, ENTRY, METADATA, Real, becomes_true
from sqlalchemy import URL, Engine, create_engine, delete, text
from sqlalchemy.pool import NullPool

import asgi_dbsession

BARE = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
"""
# This COMMIT takes long, so that a test notices a server that does not wait for it.
LINGERING = """
CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql
AS 'BEGIN PERFORM pg_sleep(0.2); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER lingers AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.note = 'lingering') EXECUTE FUNCTION linger();
"""


@dataclass(frozen=True)
class Kind:
    """One server, as it is run.

    Args:
        command: Its command line, as in the docs.
        port: How it is told to choose a port, or which one: `{port}`.
        listens: What it prints of the port that it listens on.
        started: What each of its processes prints when it serves.
        exit_status: What a SIGTERM ends it with, as it does without the middleware.
        refusals: What it may exit with when its startup fails; none, if it sends no lifespan.
        workers: How it is told to use two processes, where it can.
        reload: How it is told to reload, where it can.
        database: What it needs of the shop: an `async` or `sync` database, or an `engine`.
        driver: The driver that the shop uses below it; None is the package's own choice.
    """

    command: str
    port: str
    listens: str
    started: str
    exit_status: int
    refusals: tuple[int, ...]
    workers: str | None = None
    reload: str | None = None
    database: str = "async"
    driver: str | None = None

    def options(self, name: str | None) -> list[str]:
        """The arguments for `workers` or `reload`; none for None."""
        return str(getattr(self, name)).split() if name else []


_UVICORN: dict[str, Any] = {
    "port": "--port 0",
    "listens": r"running on http://127\.0\.0\.1:(\d+)",
    "started": "Application startup complete.",
    "exit_status": -15,  # the server stops, and then lets the signal end the process
    "refusals": (3,),
    "workers": "--workers 2",
    "reload": "--reload",
}
_HYPERCORN: dict[str, Any] = {
    "port": "--bind 127.0.0.1:0",
    "listens": r"Running on http://127\.0\.0\.1:(\d+)",
    "started": "Running on",
    "exit_status": 0,
    "refusals": (0, 1),
    "workers": "--workers 2",
    "reload": "--reload",
}
KINDS = {
    "uvicorn, asyncio, h11": Kind("uvicorn shop:app --loop asyncio --http h11", **_UVICORN),
    "uvicorn, uvloop, httptools": Kind(
        "uvicorn shop:app --loop uvloop --http httptools", driver="psycopg", **_UVICORN
    ),
    "hypercorn": Kind("hypercorn shop:app", **_HYPERCORN),
    "hypercorn, trio": Kind(
        "hypercorn shop:app --worker-class trio", database="sync", **_HYPERCORN
    ),
    "granian": Kind(
        "granian --interface asgi shop:app",
        port="--port {port}",
        listens=r"Listening at: http://127\.0\.0\.1:(\d+)",
        started="Started worker-",
        exit_status=0,
        refusals=(1,),
        workers="--workers 2",
        reload="--reload",
    ),
    "daphne": Kind(
        "daphne shop:app",
        port="--port 0",
        listens=r"Listening on TCP address 127\.0\.0\.1:(\d+)",
        started="Listening on",
        exit_status=0,
        refusals=(),
        database="engine",
        driver="asyncpg",
    ),
}


class Server:
    """A server in a process of its own, which serves the `shop.py` of a folder.

    Args:
        kind: Which server.
        folder: Where `shop.py` is.
        url: The `DATABASE_URL` it gets.
        option: `workers` or `reload`.
        database: What the shop's database is, where that is not as the server needs it.
    """

    def __init__(
        self,
        kind: Kind,
        folder: Path,
        url: str,
        option: str | None = None,
        database: str | None = None,
    ) -> None:
        self._kind = kind
        self._processes = 2 if option == "workers" else 1
        self._printed = Path(tempfile.mkstemp(dir=folder.parent)[1])  # granian watches its folder
        command = [sys.executable, "-m", *kind.command.split(), *kind.options(option)]
        with self._printed.open("wb") as printed, reserved_port() as port:
            self.process = subprocess.Popen(
                [*command, *kind.port.format(port=port).split()],
                cwd=folder,
                env=os.environ
                | {
                    "DATABASE_URL": url,
                    "PYTHONPATH": str(Path(asgi_dbsession.__file__).parents[1]),
                    "SHOP_DATABASE": database or kind.database,
                },
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def printed(self) -> str:
        """Return all output so far."""
        return self._printed.read_text()

    @property
    def url(self) -> str:
        """Return the address of the server; empty until it listens."""
        found = re.search(self._kind.listens, self.printed)
        return f"http://127.0.0.1:{found.group(1)}" if found else ""

    async def serving(self) -> "Server":
        """Wait until each process of the server serves requests."""
        await becomes_true(lambda: self._serves() or self.process.poll() is not None, 30)
        assert self.process.poll() is None, self.printed
        return self

    def _serves(self) -> bool:
        if not self.url or self.printed.count(self._kind.started) < self._processes:
            return False
        return self.pid() is not None

    def get(self, path: str = "/") -> httpx2.Response:
        """Send a request on a new connection."""
        return httpx2.get(self.url + path, verify=False)

    def post(self, content: str = "", path: str = "/") -> httpx2.Response:
        """Let the server store a row."""
        return httpx2.post(self.url + path, content=content, verify=False)

    def status(self) -> Any:
        """Return the state that the server reports."""
        return self.get("/status").json()

    def pid(self) -> str | None:
        """Return the process that answers; None while no process answers."""
        try:
            return self.get("/status").text
        except httpx2.TransportError:
            return None

    def stop(self) -> int:
        """Send SIGTERM, and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def kill(self) -> None:
        """Kill all processes of the server."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def reserved_port() -> Iterator[int]:
    """Reserve a port for a server that shares it (SO_REUSEPORT)."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@cache
def database_named(name: str) -> tuple[URL, Engine]:
    """A database with the tables of the tests, with a connection from the test process."""
    url = postgres.new_database(name)
    reader = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    METADATA.create_all(reader)
    with reader.begin() as connection:
        connection.execute(text(LINGERING))
    return url, reader


class Shop:
    """The shop in a file, with a separate database and servers of one kind.

    Args:
        name: The name of that kind.
        folder: Where the file is put.
        database_name: The name of the database, which is emptied.
        database: What the shop's database is, where that is not as the server needs it.
    """

    def __init__(
        self, name: str, folder: Path, database_name: str, database: str | None = None
    ) -> None:
        self.kind = KINDS[name]
        self.file = folder / "served" / "shop.py"
        self.file.parent.mkdir()
        shutil.copy(Path(__file__).with_name("shop.py"), self.file)
        url, reader = database_named(database_name)
        if self.kind.driver:
            url = url.set(drivername=f"postgresql+{self.kind.driver}")
        self.real = Real(self.kind.driver or "asyncpg", url, reader)
        self.servers: list[Server] = []
        self._database = database
        self.empty()

    def start(self, option: str | None = None, *, url: str | None = None) -> Server:
        """Start a server, by default on the shop's own database."""
        url = url or self.real.url.render_as_string(hide_password=False)
        server = Server(self.kind, self.file.parent, url, option, self._database)
        self.servers.append(server)
        return server

    @property
    def server(self) -> Server:
        """Return the server that was started last."""
        return self.servers[-1]

    def empty(self) -> None:
        """Delete all stored rows."""
        with self.real.reader.begin() as connection:
            connection.execute(delete(CHILD))
            connection.execute(delete(ENTRY))

    async def assert_clean(self) -> None:
        """Check that no connection is checked out and no transaction is open on the server."""
        await becomes_true(lambda: self.server.status()["held"] == 0)
        await becomes_true(lambda: self.real.open_transactions() == 0)

    def close(self) -> None:
        """Kill all servers at the end of the tests."""
        for server in self.servers:
            server.kill()


_open_shops: dict[str, Shop] = {}


async def open_shop(name: str) -> Shop:
    """A shop with a running server, shared by all tests, without rows."""
    if name not in _open_shops:
        folder = Path(tempfile.mkdtemp(prefix="shop-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        shop = _open_shops[name] = Shop(name, folder, name)
        atexit.register(shop.close)
        shop.start()
    shop = _open_shops[name]
    await shop.server.serving()
    shop.empty()
    return shop
