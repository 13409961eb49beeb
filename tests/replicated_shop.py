"""An application on a primary and two replicas, and clients of it."""

import asyncio
from collections.abc import Callable, Iterator
from http.cookies import SimpleCookie
from typing import Any
from uuid import uuid4

import pytest
from anyio import to_thread
from asgi import Exchange, respond
from conftest import ENTRY, METADATA
from replicas import Cluster, cluster
from sqlalchemy import create_engine, func, select
from sqlalchemy.pool import NullPool

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, SyncDatabase, safe_methods

KINDS = ("asyncpg", "psycopg", "psycopg-sync")
# Enough unless a driver loses a connection: one with async sessions, one with blocking sessions.
TWO_KINDS = ("asyncpg", "psycopg-sync")
AnyDatabase = AsyncDatabase[Any] | SyncDatabase[Any]
COUNT = select(func.count()).select_from(ENTRY)


def pytest_sessionfinish() -> None:
    """End the servers before the process ends, which may be cut short."""
    if cluster.cache_info().currsize:
        cluster().end()


@pytest.fixture(scope="module")
def servers() -> Cluster:
    """A primary and two replicas, with the tables of the tests."""
    servers = cluster()
    url = servers.database("replicas")
    METADATA.create_all(create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool))
    servers.catch_up()
    return servers


@pytest.fixture
def nodes(servers: Cluster) -> Iterator[Cluster]:
    """The same, empty, and without a lag afterwards."""
    servers.primary.at("replicas").ask("TRUNCATE entry, child")
    servers.catch_up()
    yield servers
    for each in servers.replicas:
        each.start()
        each.resume()
    servers.lag(0)


def ports(nodes: Cluster) -> set[int | None]:
    """The ports of the replicas."""
    return {each.port for each in nodes.replicas}


class Shop:
    """An application that writes rows and counts them.

    Args:
        nodes: The servers.
        kind: The driver.
        handle: Answers requests; None for one that writes at POST, and counts at GET.
        options: Of the database.
    """

    def __init__(
        self, nodes: Cluster, kind: str = "asyncpg", handle: Any = None, **options: Any
    ) -> None:
        self.nodes = nodes
        self.urls = [
            each.url.set(drivername=f"postgresql+{kind.removesuffix('-sync')}", database="replicas")
            for each in (nodes.primary, *nodes.replicas)
        ]
        options = {"replicas": self.urls[1:]} | options
        database_class = SyncDatabase if kind.endswith("-sync") else AsyncDatabase
        self.database: AnyDatabase = database_class(options.pop("url", self.urls[0]), **options)
        self.app = DBSessionMiddleware(handle or self.answer, self.database, read_only=safe_methods)

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Write at POST, and count at GET."""
        if scope["method"] == "POST":
            await self.write()
            await respond(send)
        elif scope["path"] == "/without":
            await respond(send)
        else:
            await respond(send, body=f"{await self.count()} {self.port or 0}".encode())

    async def write(self) -> None:
        """Store a row in the current unit."""
        await self.execute(ENTRY.insert().values(note=str(uuid4())))

    async def count(self) -> int:
        """How many rows the current unit sees."""
        return int((await self.execute(COUNT)).scalar())

    async def execute(self, statement: Any) -> Any:
        """Run a statement on the session of the current unit."""
        database = self.database
        if isinstance(database, SyncDatabase):
            return await to_thread.run_sync(lambda: database.get_session().execute(statement))
        return await database.get_session().execute(statement)

    @property
    def port(self) -> int | None:
        """The server that the session of the current unit uses."""
        session: Any = self.database.get_session()
        port: int | None = getattr(session, "sync_session", session).bind.url.port
        return port


class Client:
    """A client that keeps its cookies."""

    def __init__(self, app: Any, cookies: dict[str, str] | None = None) -> None:
        self.app = app
        self.cookies: dict[str, str] = cookies or {}

    async def ask(self, method: str, path: str = "/", **scope: Any) -> Exchange:
        """Send a request, and keep what the response says.

        Raises:
            Exception: Whatever the application raised.
        """
        exchange = Exchange(self.app, path, method=method)
        exchange.scope |= scope
        if self.cookies:
            value = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
            exchange.scope["headers"].append((b"cookie", value.encode()))
        await exchange.run()
        if exchange.error is not None:
            raise exchange.error
        for value in set_cookies(exchange):
            self.cookies |= {each.key: each.value for each in SimpleCookie(value).values()}
        return exchange

    async def write(self) -> None:
        """Store a row."""
        await self.ask("POST")

    async def read(self) -> tuple[int, int]:
        """How many rows there are, and the port of the server that said so."""
        count, port = (await self.ask("GET")).body.split()
        return int(count), int(port)


def set_cookies(exchange: Exchange) -> list[str]:
    """The cookies that a response sets."""
    headers = exchange.messages[0]["headers"]
    return [value.decode() for name, value in headers if name == b"set-cookie"]


async def reads_from(
    client: Callable[[], Client], wanted: set[int | None], seconds: float = 10
) -> None:
    """Read with new clients until they have read from exactly these servers."""
    deadline = asyncio.get_running_loop().time() + seconds
    while {(await client().read())[1] for _ in range(6)} != wanted:
        assert asyncio.get_running_loop().time() < deadline, "other servers were read from"
        await asyncio.sleep(0.05)
