"""The primary dies, and a replica takes its place: no client sees an older state than before."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import METADATA, becomes_true
from replicas import Cluster
from replicated_shop import KINDS, Client, Shop, reads_from
from sqlalchemy import URL, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

pytestmark = pytest.mark.anyio


@pytest.fixture
def doomed() -> Iterator[Cluster]:
    """Servers of the test's own: what is promoted stays a primary."""
    servers = Cluster()
    url = servers.database("replicas")
    METADATA.create_all(create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool))
    servers.catch_up()
    yield servers
    servers.end()


def primary_of(servers: Cluster, kind: str) -> URL:
    """A URL for whichever server is the primary."""
    hosts = [f"127.0.0.1:{each.port}" for each in (servers.primary, *servers.replicas)]
    query = {"host": hosts, "target_session_attrs": "read-write"}
    driver = f"postgresql+{kind.removesuffix('-sync')}"
    return URL.create(driver, "postgres", database="replicas", query=query)


class Watcher:
    """A client that remembers the greatest count it has seen, and what it has written since."""

    def __init__(self, app: Any) -> None:
        self._client = Client(app)
        self.seen = 0
        self.reads = 0
        self.failed = 0
        self.steps_back = 0

    async def work(self, until: asyncio.Event) -> None:
        """Read, and sometimes write, until it is told to stop."""
        while not until.is_set():
            try:
                if random.random() < 0.1:
                    await self._client.write()
                    self.seen += 1
                count, _ = await self._client.read()
                self.reads += 1
                self.steps_back += count < self.seen
                self.seen = max(self.seen, count)
            except (DBAPIError, OSError):
                self.failed += 1
            await asyncio.sleep(0.01)


async def test_reads_go_on_while_a_replica_takes_the_place_of_the_primary(
    doomed: Cluster,
) -> None:
    """Each client sees all that it has seen before, whichever server it reads from."""
    shops = [Shop(doomed, kind, url=primary_of(doomed, kind)) for kind in KINDS]
    heir, other = doomed.replicas
    doomed.primary.set(synchronous_standby_names="ANY 2 (*)")  # so that COMMIT loses nothing
    async with shops[0].database, shops[1].database, shops[2].database:
        until = asyncio.Event()
        watchers = [Watcher(shop.app) for shop in shops for _ in range(4)]
        working = [asyncio.create_task(each.work(until)) for each in watchers]
        await asyncio.sleep(1)
        await asyncio.to_thread(doomed.primary.kill)
        before = [each.reads for each in watchers]
        await asyncio.sleep(1)
        gone_on = [each.reads > number for each, number in zip(watchers, before, strict=True)]
        assert sum(gone_on) >= 6, "reads go on"
        await asyncio.to_thread(heir.promote)
        await asyncio.to_thread(other.follow, heir)
        for shop in shops:
            await reads_from(lambda shop=shop: Client(shop.app), {other.port})  # type: ignore[misc]
        written = heir.at("replicas").ask("SELECT count(*) FROM entry")
        await asyncio.sleep(1)
        until.set()
        await asyncio.gather(*working)
        assert sum(each.steps_back for each in watchers) == 0
        assert min(each.seen for each in watchers) > written


async def test_a_replica_of_the_old_primary_is_left_out(doomed: Cluster) -> None:
    """Though it has more WAL than the new primary: it is of another timeline."""
    shop = Shop(doomed, url=primary_of(doomed, "asyncpg"))
    heir, other = doomed.replicas
    async with shop.database:
        await reads_from(lambda: Client(shop.app), {heir.port, other.port})
        heir.set(primary_conninfo="")
        position = "SELECT pg_last_wal_replay_lsn() - '0/0'"
        far = other.ask(position) + 1_000_000
        doomed.primary.ask(f"SELECT pg_logical_emit_message(true, '', repeat('x', {10**6}))")
        await becomes_true(lambda: other.ask(position) > far)
        await asyncio.to_thread(doomed.primary.kill)
        await asyncio.to_thread(heir.promote)
        heir.at("replicas").ask("TRUNCATE entry, child")
        while True:
            client = Client(shop.app)
            try:
                await client.write()
            except (DBAPIError, OSError):
                continue  # of a connection to the old primary
            break
        assert other.ask(position) > heir.ask("SELECT pg_current_wal_insert_lsn() - '0/0'")
        for _ in range(20):
            assert await client.read() == (1, 0)
            assert await Client(shop.app).read() == (1, 0)
            await asyncio.sleep(0.02)
