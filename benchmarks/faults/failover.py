"""Kills a primary under load while a standby takes over, and checks if work is lost.

The workers know one URL with both addresses, and the driver goes to whichever takes writes.
Replication is synchronous: COMMIT is answered once the standby has it too.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count

from .client import NOBODY_LISTENED, Request, ask
from .cluster import HOST, Cluster, in_thread
from .ledger import SCHEMA, Finding, Ledger, compare
from .workers import Workers

_CLIENTS = 8
_PATIENCE = 30.0  # seconds


@dataclass(frozen=True)
class Failover:
    """The results of the failover.

    Attributes:
        ledger: The answers to the clients, before and after the failover.
        finding: The rows that are found on the former standby.
        before: How many writes were acknowledged when the primary was killed.
        promotion: Seconds until the standby reported that it is the primary.
        gap: Seconds until the first write was acknowledged again; None if no write was.
    """

    ledger: Ledger
    finding: Finding
    before: int
    promotion: float
    gap: float | None


@asynccontextmanager
async def primary_and_standby() -> AsyncIterator[tuple[Cluster, Cluster]]:
    """Two servers; the second one has all work that the first one has acknowledged."""
    clusters: list[Cluster] = []
    try:
        clusters.append(await asyncio.to_thread(Cluster))
        primary = clusters[0]
        await in_thread(primary.start)
        await primary.query(SCHEMA)
        clusters.append(await asyncio.to_thread(Cluster, primary))
        standby = clusters[1]
        await in_thread(standby.start)
        await primary.query("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await primary.query("SELECT pg_reload_conf()")
        async with asyncio.timeout(_PATIENCE):
            while await primary.query("SELECT sync_state FROM pg_stat_replication") != [("sync",)]:
                await asyncio.sleep(0.05)
        yield primary, standby
    finally:
        for cluster in clusters:
            await in_thread(cluster.remove)


def url_of_both(primary: Cluster, standby: Cluster, driver: str) -> str:
    """Return one URL with both addresses; the driver connects to the server that accepts writes."""
    hosts = "&".join(f"host={HOST}:{cluster.port}" for cluster in (primary, standby))
    return f"postgresql+{driver}://postgres@/postgres?{hosts}&target_session_attrs=read-write"


async def fail_over(tool: str, driver: str, *, seconds: float) -> Failover:
    """Write for a while, kill the primary, promote the standby, and write for a while again."""
    async with primary_and_standby() as (primary, standby):
        workers = Workers(tool, url_of_both(primary, standby, driver))
        await workers.start()
        try:
            return await _fail_over(workers, primary, standby, seconds)
        finally:
            await workers.stop()


async def _fail_over(
    workers: Workers, primary: Cluster, standby: Cluster, seconds: float
) -> Failover:
    ledger, numbers, stopped = Ledger(), count(1), asyncio.Event()
    killed = 0.0
    first: float | None = None

    async def be_client(port: int) -> None:
        nonlocal first
        while not stopped.is_set():
            number = next(numbers)
            ledger.requests += 1
            asked = time.monotonic()
            status = await ask(port, Request(f"/entries/{number}"))
            ledger.note(number, status, errors_leave_open=True)
            if number in ledger.acknowledged and killed and asked > killed and first is None:
                first = time.monotonic()
            await asyncio.sleep(0.01 if status != NOBODY_LISTENED else 0.05)

    async with asyncio.TaskGroup() as group:
        for client in range(_CLIENTS):
            group.create_task(be_client(workers.ports[client % len(workers.ports)]))
        await asyncio.sleep(seconds)
        before, killed = len(ledger.acknowledged), time.monotonic()
        await in_thread(primary.kill)
        await in_thread(standby.promote)
        promoted = time.monotonic()
        while first is None and time.monotonic() < promoted + _PATIENCE:
            await asyncio.sleep(0.05)
        await asyncio.sleep(seconds)
        stopped.set()
    return Failover(
        ledger,
        await compare(ledger, standby),
        before=before,
        promotion=promoted - killed,
        gap=None if first is None else first - killed,
    )
