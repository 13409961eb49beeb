"""Reads on replicas show a client all that it has written, and all that it has seen."""

import asyncio
import time
from typing import Any

import pytest
from asgi import respond
from conftest import ENTRY
from replicas import Cluster
from replicated_shop import COUNT, TWO_KINDS, Client, Shop, ports, reads_from, set_cookies
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from asgi_dbsession import (
    ForbiddenWrite,
    Replicas,
    SyncDatabase,
)
from asgi_dbsession.replicas.lag import Lag
from asgi_dbsession.replicas.position import Position
from asgi_dbsession.replicas.question import Answer

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_a_client_reads_what_it_has_written_whatever_the_lag(
    nodes: Cluster, kind: str
) -> None:
    """Each finds its row at once, while the replicas are behind, and when they follow."""
    shop = Shop(nodes, kind, pool_size=10)

    async def work(number: int) -> list[bool]:
        client, found = Client(shop.app), []
        for _ in range(10):
            before, _ = await client.read()
            await client.write()
            found += [(await client.read())[0] > before for _ in range(4)]
            await asyncio.sleep(0.1)
        return found

    nodes.lag(400)
    async with shop.database:
        found = await asyncio.gather(*map(work, range(10)))
        assert sum(map(sum, found)) == 400
        await reads_from(lambda: Client(shop.app), ports(nodes))


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_a_client_without_its_cookie_sees_the_lag(nodes: Cluster, kind: str) -> None:
    """So the tests above and below would notice if positions were lost."""
    shop = Shop(nodes, kind)
    nodes.lag(3000)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        await Client(shop.app).write()
        assert 0 in [(await Client(shop.app).read())[0] for _ in range(5)]


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_a_client_never_sees_an_older_state_than_before(nodes: Cluster, kind: str) -> None:
    """Not even if it has only read, and one replica stands still while another one goes on."""
    shop = Shop(nodes, kind)
    async with shop.database:
        await Client(shop.app).read()
        nodes.replicas[0].pause()
        clients = [Client(shop.app) for _ in range(6)]
        seen = [0] * len(clients)
        for _ in range(60):
            await Client(shop.app).write()
            for number, client in enumerate(clients):
                count, _ = await client.read()
                assert count >= seen[number]
                seen[number] = count
        assert min(seen) < max(seen), "both replicas were in use"
        nodes.replicas[0].kill()
        for _ in range(20):
            for number, client in enumerate(clients):
                try:
                    count, _ = await client.read()
                except (DBAPIError, OSError):
                    continue  # it was connected to the replica that is gone
                assert count >= seen[number]
                seen[number] = count
        assert min(seen) == 60


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_everything_but_reads_uses_the_primary(nodes: Cluster, kind: str) -> None:
    """A write in a read-only request is refused, on a replica as elsewhere."""

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/text":
            await shop.execute(text("INSERT INTO entry (note) VALUES ('new')"))
        elif scope["path"] == "/construct":
            await shop.write()
        else:
            assert await shop.count() == 0
            await respond(send, body=str(shop.port).encode())

    shop = Shop(nodes, kind, handle)
    async with shop.database:
        client = Client(shop.app)
        for path in ("/text", "/construct"):
            with pytest.raises((ForbiddenWrite, DBAPIError)):
                await client.ask("GET", path)
        assert int((await client.ask("GET")).body) in ports(nodes)
        assert int((await client.ask("POST")).body) == nodes.primary.port
        assert nodes.primary.at("replicas").ask("SELECT count(*) FROM entry") == 0
        pools: Any = [each.engine.pool for each in (shop.database, *shop.database.replicas)]
        assert [each.checkedout() for each in pools] == [0, 0, 0]


@pytest.mark.parametrize(
    "cookie",
    [
        "nonsense",
        "",
        "x" * 10_000,
        "00000001.ffffffffffffffff.{cluster}",
        "00000001.0000000000000000.00000000",
        "00000009.0000000000000000.{cluster}",
        "00000001.0000000000000000.{cluster}.00000000.0",
        "{position}; db_position={position}",
    ],
)
@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_a_cookie_that_cannot_be_trusted_costs_a_read_on_the_primary(
    nodes: Cluster, kind: str, cookie: str
) -> None:
    """And nothing else: the next cookie is a right one."""
    shop = Shop(nodes, kind)
    async with shop.database:
        writer = Client(shop.app)
        await writer.write()
        position = writer.cookies["db_position"]
        nodes.catch_up()
        text = cookie.format(position=position, cluster=position.split(".")[2])
        client = Client(shop.app, {"db_position": text})
        assert await client.read() == (1, nodes.primary.port)
        client.cookies = {"db_position": client.cookies["db_position"]}
        nodes.catch_up()  # the server writes to its WAL by itself, too
        assert (await client.read())[1] in ports(nodes)
        forged = Client(shop.app, {"db_position": text})
        assert set_cookies(await forged.ask("GET", "/without")) == []


async def test_a_position_is_told_where_it_moved_only(nodes: Cluster) -> None:
    """Other responses stay as they are, and so do responses for shared caches."""

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        await (shop.write() if scope["method"] == "POST" else shop.count())
        headers = [(b"cache-control", b"public, max-age=60")] if scope["path"] == "/all" else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    urls = Shop(nodes).urls[1:]
    shop = Shop(nodes, handle=handle, replicas=Replicas(urls, cookie="seen", path="/shop"))
    async with shop.database:
        client = Client(shop.app)
        assert set_cookies(await client.ask("GET", "/all")) == []
        (cookie,) = set_cookies(await client.ask("GET"))
        assert set_cookies(await client.ask("GET")) == []
        name, _, attributes = cookie.partition("=")
        assert name == "seen"
        assert attributes.split("; ")[1:] == [
            *("Path=/shop", "Max-Age=60", "HttpOnly", "SameSite=Lax"),
        ]
        (cookie,) = set_cookies(await client.ask("POST", scheme="https"))
        assert cookie.endswith("; Secure")


async def test_the_cookie_is_renewed_before_it_expires(
    nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a client that only reads would forget its replica while it goes on reading."""
    shop = Shop(nodes)
    async with shop.database:
        client = Client(shop.app)
        await client.read()
        monkeypatch.setattr("asgi_dbsession.replicas.position.time", lambda: time.time() + 29)
        assert set_cookies(await client.ask("GET")) == []
        monkeypatch.setattr("asgi_dbsession.replicas.position.time", lambda: time.time() + 31)
        assert len(set_cookies(await client.ask("GET"))) == 1


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_a_replica_that_is_read_while_the_client_writes_elsewhere_is_remembered(
    nodes: Cluster, kind: str
) -> None:
    """A request may go on reading from its replica after a `begin()` on the primary."""

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        await shop.count()
        database: Any = shop.database
        if isinstance(database, SyncDatabase):
            with database.begin() as session:
                session.execute(ENTRY.insert().values(note="inner"))
        else:
            async with database.begin() as session:
                await session.execute(ENTRY.insert().values(note="inner"))
        written.append(database.position)
        slow.pause()
        await writer.write()
        while await shop.count() < 2:  # the replica goes on, and shows more than the position says
            await asyncio.sleep(0.01)
        await respond(send, body=str(shop.port).encode())

    shop, reader = Shop(nodes, kind, handle), Shop(nodes, kind)
    writer = Client(reader.app)
    written: list[str] = []
    slow, quick = nodes.replicas
    async with shop.database, reader.database:
        while True:
            client = Client(shop.app)
            slow.resume()
            nodes.primary.at("replicas").ask("TRUNCATE entry, child")
            nodes.catch_up()
            try:
                exchange = await asyncio.wait_for(client.ask("GET"), 2)
            except TimeoutError:
                continue  # it read from the replica that was paused
            break
        assert int(exchange.body) == quick.port
        reading = Client(reader.app, client.cookies)
        assert reading.cookies["db_position"].startswith(written[-1])
        for _ in range(5):
            assert (await reading.read())[0] == 2


async def test_a_position_at_the_start_of_a_segment_of_the_wal_is_reached(nodes: Cluster) -> None:
    """Its first page has a longer header, which replicas replay with the next record too."""
    shop = Shop(nodes)
    database: Any = shop.database
    async with database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        for _ in range(10):
            nodes.primary.ask("SELECT pg_logical_emit_message(false, '', 'x')")
            nodes.primary.ask("SELECT pg_switch_wal()")
            async with database.begin() as session:
                await session.execute(COUNT)
            if nodes.primary.ask("SELECT pg_current_wal_insert_lsn() - '0/0'") % 2**24 == 40:
                break
        else:
            raise AssertionError("no position was at the start of a segment")
        cookie = {"db_position": database.position}
        await reads_from(lambda: Client(shop.app, dict(cookie)), ports(nodes), 5)


async def test_a_position_at_the_start_of_a_page_of_the_wal_is_reached(nodes: Cluster) -> None:
    """The primary counts the header of an empty page; replicas replay it with the next record."""
    shop = Shop(nodes)
    database: Any = shop.database
    ask, fill = nodes.primary.ask, "SELECT pg_logical_emit_message(false, '', repeat('x', {}))"
    offset = "SELECT (pg_current_wal_insert_lsn() - '0/0') % 8192"
    async with database:
        for _ in range(300):
            room = 8192 - int(ask(offset))
            async with database.begin() as session:
                await session.execute(text(fill.format(max(room - 56, 8))))
            if int(ask(offset)) == 24:
                break
        else:
            raise AssertionError("no record ended with its page")
        cookie = {"db_position": database.position}
        await reads_from(lambda: Client(shop.app, dict(cookie)), ports(nodes), 5)


def test_a_process_that_only_writes_keeps_few_positions() -> None:
    """Every commit tells the position of the primary, and no read asks how old it may be."""
    lag = Lag(10)
    for second in range(1000):
        at = Position(1, second, "cluster")
        lag.record(Answer(second, at, is_standby=False, flushed=at, name="primary"))
    assert len(lag._history) == 11
    assert lag.floor(999) == Position(1, 989, "cluster")
