"""A replica dies under a request: the request runs again elsewhere, because it changed nothing."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from asgi import respond
from conftest import ENTRY
from replicas import Cluster, Node
from replicated_shop import COUNT, KINDS, TWO_KINDS, Client, Shop, ports, reads_from
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, SyncDatabase, safe_methods

pytestmark = pytest.mark.anyio

_SLEEPING = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = 'replicas' AND pid <> pg_backend_pid() AND query LIKE '%entry%'"
)


def terminate(node: Node) -> None:
    """End the connections of the requests, as an operator would."""
    node.ask(_SLEEPING)


def end_at_once(node: Node) -> None:
    """End the server before anybody asks for its position again."""
    node.end()
    with suppress(OSError):
        while True:
            socket.create_connection(("127.0.0.1", node.port)).close()
            time.sleep(0.001)


class Doomed(Shop):
    """An application whose GET does something to its server between two statements.

    Args:
        nodes: The servers.
        kind: The driver.
        doom: What happens to the server of the first request.
        options: Of the database; `attempts` of the middleware.
    """

    def __init__(
        self, nodes: Cluster, kind: str, doom: Callable[[Node], object], **options: Any
    ) -> None:
        attempts = options.pop("attempts", 1)
        super().__init__(nodes, kind, **options)
        self.tried: list[int | None] = []
        self._doom: Callable[[Node], object] | None = doom
        self.doomed = DBSessionMiddleware(
            self.read_twice, self.database, read_only=safe_methods, attempts=attempts
        )

    async def read_twice(self, scope: Any, receive: Any, send: Any) -> None:
        """Read, lose the server the first time, and read again."""
        if scope["path"] == "/unread":
            self.database.get_session().get_bind()
        else:
            await self.execute(COUNT)
        self.tried.append(self.port)
        doom, self._doom = self._doom, None
        if doom is not None:
            await asyncio.to_thread(doom, self.node(self.port))
        await self.answer(scope, receive, send)

    def node(self, port: int | None) -> Node:
        """The server at this port."""
        servers = (self.nodes.primary, *self.nodes.replicas)
        return next(each for each in servers if each.port == port)

    def held(self) -> int:
        """How many connections are in use."""
        engines: Any = [each.engine for each in (self.database, *self.database.replicas)]
        return sum(each.pool.checkedout() for each in engines)


@pytest.mark.parametrize("doom", [Node.kill, Node.stop, terminate])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_request_that_lost_its_replica_runs_again(
    nodes: Cluster, kind: str, doom: Callable[[Node], object]
) -> None:
    """On another server, and the client sees nothing of it."""
    shop = Doomed(nodes, kind, doom, attempts=3)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        client = Client(shop.app)
        await client.write()
        nodes.catch_up()
        count, port = await Client(shop.doomed, client.cookies).read()
        assert count == 1
        assert len(shop.tried) == 2
        assert port == shop.tried[1]
        if doom is not terminate:
            assert port != shop.tried[0]
        assert shop.held() == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_without_attempts_the_next_request_goes_elsewhere(nodes: Cluster, kind: str) -> None:
    """The request that lost its replica fails."""
    shop = Doomed(nodes, kind, Node.kill)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        with pytest.raises(DBAPIError):
            await Client(shop.doomed).read()
        (dead,) = shop.tried
        assert {(await Client(shop.app).read())[1] for _ in range(4)} == ports(nodes) - {dead}
        assert shop.held() == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_a_replica_that_refuses_connections_costs_no_request(
    nodes: Cluster, kind: str
) -> None:
    """Nothing was read yet, so the same unit of work reads from the primary."""
    shop = Doomed(nodes, kind, end_at_once)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        for each in shop.database.replicas:
            disposed: Any = each.engine.dispose()
            if disposed is not None:
                await disposed
        exchange = await Client(shop.doomed).ask("GET", "/unread")
        assert exchange.body == f"0 {nodes.primary.port}".encode()
        (dead,) = shop.tried
        assert {(await Client(shop.app).read())[1] for _ in range(4)} == ports(nodes) - {dead}
        assert shop.held() == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_a_replica_that_starts_again_before_it_is_connected_to_shows_no_old_state(
    nodes: Cluster, kind: str
) -> None:
    """It accepts readers before it has replayed what the client has seen."""

    def start_again(node: Node) -> None:
        node.kill()
        node.start()

    shop = Doomed(nodes, kind, start_again, poolclass=NullPool)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        for each in nodes.replicas:
            each.ask("CHECKPOINT")
        client = Client(shop.app)
        await client.write()
        nodes.catch_up()
        assert (await client.read())[1] in ports(nodes)
        nodes.lag(60_000)
        await client.read()
        exchange = await Client(shop.doomed, client.cookies).ask("GET", "/unread")
        assert shop.tried[0] in ports(nodes)
        assert exchange.body == f"1 {nodes.primary.port}".encode()
        old = shop.node(shop.tried[0]).at("replicas")
        assert old.ask("SELECT count(*) FROM entry") == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_connections_from_before_a_restart_fail_no_request(nodes: Cluster, kind: str) -> None:
    """They are replaced when they leave the pool, also without `pool_pre_ping`."""
    shop, replica = Shop(nodes, kind), nodes.replicas[0]
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        await asyncio.gather(*(Client(shop.app).read() for _ in range(10)))
        await asyncio.to_thread(replica.kill)
        await asyncio.to_thread(replica.start)
        await asyncio.sleep(0.4)  # so that the next request asks for positions
        await reads_from(lambda: Client(shop.app), ports(nodes))
        await asyncio.gather(*(Client(shop.app).read() for _ in range(20)))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_query_that_a_replica_cancels_runs_again(nodes: Cluster, kind: str) -> None:
    """Replay waits a second for a query that it conflicts with, and then cancels the query."""
    tried: list[int] = []

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        tried.append(1)
        if len(tried) == 1:
            await shop.execute(text("SELECT count(*), pg_sleep(5) FROM entry"))
        await shop.answer(scope, receive, send)

    shop = Shop(nodes, kind)
    app = DBSessionMiddleware(handle, shop.database, read_only=safe_methods, attempts=2)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        reading = asyncio.create_task(Client(app).read())
        await asyncio.sleep(0.5)
        nodes.primary.at("replicas").ask("TRUNCATE entry, child")
        assert (await reading)[0] == 0
        assert len(tried) == 2


async def test_a_cancelled_request_takes_no_replica_out(
    nodes: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection is closed, but the replica is well."""

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await shop.execute(text("SELECT pg_sleep(5)"))

    for kind in ("asyncpg", "psycopg"):
        begun = asyncio.Event()
        shop = Shop(nodes, kind)
        app = DBSessionMiddleware(handle, shop.database, read_only=safe_methods)
        async with shop.database:
            await reads_from(lambda shop=shop: Client(shop.app), ports(nodes))  # type: ignore[misc]
            caplog.clear()
            reading = asyncio.create_task(Client(app).read())
            await begun.wait()
            await asyncio.sleep(0.1)
            reading.cancel()
            await asyncio.wait([reading])
            assert {(await Client(shop.app).read())[1] for _ in range(6)} == ports(nodes)
            names = {each.name for each in caplog.records if each.levelno >= logging.INFO}
            assert "asgi_dbsession" not in names


@pytest.mark.parametrize("kind", KINDS)
async def test_a_request_that_may_write_does_not_run_again(nodes: Cluster, kind: str) -> None:
    """Its COMMIT may have been in time, so nobody knows if it changed something."""
    tried: list[int] = []

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        tried.append(1)
        await shop.write()
        await asyncio.to_thread(terminate, nodes.primary)
        await shop.write()
        await respond(send)

    shop = Shop(nodes, kind)
    app = DBSessionMiddleware(handle, shop.database, read_only=safe_methods, attempts=3)
    async with shop.database:
        with pytest.raises(DBAPIError):
            await Client(app).write()
        assert tried == [1]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_read_runs_again_without_replicas_too(nodes: Cluster, kind: str) -> None:
    """A server that starts again costs no request that may only read."""
    shop = Doomed(nodes, kind, terminate, attempts=2, replicas=())
    async with shop.database:
        assert (await Client(shop.doomed).read()) == (0, nodes.primary.port)
        assert shop.tried == [nodes.primary.port] * 2


@pytest.mark.parametrize("kind", KINDS)
async def test_run_transaction_runs_again_if_a_read_in_it_lost_its_replica(
    nodes: Cluster, kind: str
) -> None:
    """The function is called again from the start."""
    tried: list[int] = []

    def lose(port: int) -> None:
        tried.append(port)
        if len(tried) == 1:
            (its_server,) = (each for each in nodes.replicas if each.port == port)
            its_server.kill()

    def read_and_write() -> None:
        database: Any = shop.database
        with database.begin(read_only=True) as session:
            session.scalar(COUNT)
            lose(session.get_bind().url.port)
            session.scalar(COUNT)
        database.get_session().execute(ENTRY.insert().values(note="once"))

    async def read_and_write_later() -> None:
        database: Any = shop.database
        async with database.begin(read_only=True) as session:
            await session.scalar(COUNT)
            await asyncio.to_thread(lose, session.get_bind().url.port)
            await session.scalar(COUNT)
        await database.get_session().execute(ENTRY.insert().values(note="once"))

    shop = Shop(nodes, kind)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        if isinstance(shop.database, SyncDatabase):
            await asyncio.to_thread(shop.database.run_transaction, read_and_write)
        else:
            assert isinstance(shop.database, AsyncDatabase)
            await shop.database.run_transaction(read_and_write_later)
        assert len(tried) == 2
        assert nodes.primary.at("replicas").ask("SELECT count(*) FROM entry") == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_of_the_application_takes_no_replica_out(nodes: Cluster, kind: str) -> None:
    """A listener that raises is not a server that is down, and its error is not hidden."""

    def refuse(*_: object) -> None:
        raise LookupError("of the application")

    shop = Shop(nodes, kind)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        engines: list[Any] = [each.engine for each in shop.database.replicas]
        pools = [getattr(each, "sync_engine", each).pool for each in engines]
        for pool in pools:
            event.listen(pool, "checkout", refuse)
        with pytest.raises(LookupError):
            while True:
                await Client(shop.app).read()
        for pool in pools:
            event.remove(pool, "checkout", refuse)
        assert {(await Client(shop.app).read())[1] for _ in range(6)} == ports(nodes)


class Relay:
    """Relays connections to a server. It can freeze: then nobody gets an answer, or an error."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = [self._listener]
        self._frozen: list[socket.socket] = []
        self.is_frozen = False
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        """Answer nobody, neither on open connections nor on new ones."""
        self.is_frozen, self._frozen = True, list(self._open)

    def close(self) -> None:
        """Close all connections, so that every thread that waits gets an error."""
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                if not self.is_frozen:
                    server = socket.create_connection(("127.0.0.1", self._to))
                    self._open.append(server)
                    for pair in ((client, server), (server, client)):
                        threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if source not in self._frozen:
                    to.sendall(data)
            if source not in self._frozen:
                to.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_a_replica_that_stops_to_answer_delays_no_request_and_is_asked_again(
    nodes: Cluster, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its old connections stay silent. After the time limit, new connections are tried."""
    monkeypatch.setattr("asgi_dbsession.replicas.server.LIMIT", 0.5)
    monkeypatch.setattr("asgi_dbsession.replicas.thread_server.LIMIT", 0.5)
    relay = Relay(nodes.replicas[0].port)
    driver = f"postgresql+{kind.removesuffix('-sync')}"
    url = nodes.replicas[0].url.set(drivername=driver, database="replicas", port=relay.port)
    shop = Shop(nodes, kind, replicas=[url])
    try:
        async with shop.database:
            await reads_from(lambda: Client(shop.app), {relay.port})
            await asyncio.sleep(0.4)
            relay.freeze()
            began = time.monotonic()
            while time.monotonic() < began + 4:
                asked = time.monotonic()
                assert (await Client(shop.app).read())[1] == nodes.primary.port
                assert time.monotonic() - asked < 1.3
            assert sum("(run)" in each.name for each in threading.enumerate()) <= 4
            relay.is_frozen = False
            await reads_from(lambda: Client(shop.app), {relay.port})
    finally:
        relay.close()
