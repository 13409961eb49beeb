"""Counts what clients of a primary and two replicas see too late, or backwards, under faults.

Each client counts up a number of its own, and reads this number and the sum of all. A *stale* read
shows a smaller number than the client has written. A *step back* shows a smaller sum than the
client has seen. Routers, servers and clients share one machine.
"""

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, create_engine
from sqlalchemy.pool import NullPool

from .routers import COUNTER, ROUTERS, Package

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from replicas import Cluster
from replicated_shop import Client

_CLIENTS = 20
_DATABASE = "bench"


@dataclass
class Seen:
    """What all clients of one router saw under one fault."""

    fault: str
    router: str
    reads: int = 0
    writes: int = 0
    stale: int = 0
    back: int = 0
    failed: int = 0

    @property
    def is_own(self) -> bool:
        """True if the router was this package."""
        return self.router.startswith(Package.name)


async def watch_all(faults: Iterable[str], seconds: float) -> list[Seen]:
    """Run each router under each fault, and return what the clients saw; print it meanwhile."""
    found = []
    async with _started() as cluster:
        for fault in faults:
            for make in ROUTERS:
                if fault == PROMOTED:  # the servers cannot be used again afterwards
                    async with _started() as doomed:
                        found.append(await watch(doomed, make, fault, seconds))
                else:
                    found.append(await watch(cluster, make, fault, seconds))
                print(found[-1], flush=True)
    return found


async def watch(cluster: Cluster, make: Any, fault: str, seconds: float) -> Seen:
    """Run one router under one fault, and return what its clients saw."""
    await asyncio.to_thread(_reset, cluster)
    async with make(urls_of(cluster)) as router:
        seen, until = Seen(fault, router.name), time.monotonic() + seconds
        clients = (_use(router.app, each, seen, until) for each in range(_CLIENTS))
        await asyncio.gather(FAULTS[fault](cluster, until), *clients)
    return seen


def urls_of(cluster: Cluster) -> list[URL]:
    """Return the URL for whichever server is the primary, and those of the replicas."""
    servers = (cluster.primary, *cluster.replicas)
    _, *replicas = (
        each.url.set(drivername="postgresql+asyncpg", database=_DATABASE) for each in servers
    )
    hosts = [f"127.0.0.1:{each.port}" for each in servers]
    query = {"host": hosts, "target_session_attrs": "read-write"}
    primary = URL.create("postgresql+asyncpg", "postgres", database=_DATABASE, query=query)
    return [primary, *replicas]


def prepare(cluster: Cluster) -> None:
    """Create the database with a number for each client."""
    url = cluster.database(_DATABASE)
    engine = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    COUNTER.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(COUNTER.insert(), [{"id": each, "n": 0} for each in range(_CLIENTS)])
    cluster.catch_up()


@asynccontextmanager
async def _started() -> AsyncIterator[Cluster]:
    cluster = await asyncio.to_thread(Cluster)
    try:
        await asyncio.to_thread(prepare, cluster)
        yield cluster
    finally:
        await asyncio.to_thread(cluster.end)


def _reset(cluster: Cluster) -> None:
    for each in cluster.replicas:
        each.resume()
    cluster.lag(0)
    cluster.primary.at(_DATABASE).ask("UPDATE counter SET n = 0")
    cluster.catch_up()


async def _use(app: Any, number: int, seen: Seen, until: float) -> None:
    """Read, and write now and then, as one client."""
    client = Client(app)
    mine = highest = 0
    while time.monotonic() < until:
        try:
            if random.random() < 0.1:
                mine = int((await client.ask("POST", f"/{number}")).body)
                seen.writes += 1
            n, total = map(int, (await client.ask("GET", f"/{number}")).body.split())
        except Exception:  # whatever a router raises where a server is gone
            seen.failed += 1
            await asyncio.sleep(0.01)
            continue
        seen.reads += 1
        seen.stale += n < mine
        seen.back += total < highest
        highest = max(highest, total)
        await asyncio.sleep(random.random() * 0.02)


async def _one_second(cluster: Cluster, until: float) -> None:
    await asyncio.to_thread(cluster.lag, 1000)
    await asyncio.sleep(until - time.monotonic())


async def _three_seconds(cluster: Cluster, until: float) -> None:
    await asyncio.to_thread(cluster.lag, 3000)
    await asyncio.sleep(until - time.monotonic())


async def _paused(cluster: Cluster, until: float) -> None:
    """One replica after the other replays nothing for a second."""
    while time.monotonic() < until:
        for each in cluster.replicas:
            await asyncio.to_thread(each.pause)
            await asyncio.sleep(1)
            await asyncio.to_thread(each.resume)


async def _killed(cluster: Cluster, until: float) -> None:
    """One replica after the other is killed, and started two seconds later."""
    while time.monotonic() < until:
        for each in cluster.replicas:
            await asyncio.to_thread(each.kill)
            await asyncio.sleep(2)
            await asyncio.to_thread(each.start)
            await asyncio.sleep(1)


async def _promoted(cluster: Cluster, until: float) -> None:
    """The primary is killed, a replica is promoted a second later, and the other follows."""
    heir, other = cluster.replicas
    # so that COMMIT loses nothing
    await asyncio.to_thread(cluster.primary.set, synchronous_standby_names="ANY 2 (*)")
    await asyncio.sleep((until - time.monotonic()) / 3)
    await asyncio.to_thread(cluster.primary.kill)
    await asyncio.sleep(1)
    await asyncio.to_thread(heir.promote)
    await asyncio.to_thread(other.follow, heir)


PROMOTED = "the primary killed, a replica promoted"
FAULTS: dict[str, Callable[[Cluster, float], Awaitable[None]]] = {
    "both replicas 1 s behind": _one_second,
    "both replicas 3 s behind": _three_seconds,
    "replay paused in turn": _paused,
    "replicas killed in turn": _killed,
    PROMOTED: _promoted,
}
