"""Counts what clients see too late, or backwards, on a primary and two replicas.

    python -m benchmarks.replicas
    python -m benchmarks.replicas --fault "both replicas 1 s behind" --seconds 60

Three ways to route reads serve the same clients, in process: this package, a hand-written router
that sends a client to the primary for two seconds after a write, and a hand-written router that
always uses a replica. Each client counts up a number of its own, and reads it and the sum of all.
A *stale* read shows a smaller number than the client has written. A *step back* shows a smaller sum
than the client has seen. Then it measures reads with one, two and three servers, and what replicas
cost a write. All servers and clients share this machine.
"""

import asyncio
import random
import sys
import time
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from asgi import Exchange, respond
from replicas import Cluster
from replicated_shop import Client as CookieClient
from sqlalchemy import URL, Column, Integer, MetaData, Table, create_engine, func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from typing_extensions import Self

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, safe_methods

CLIENTS = 20
COUNTER = Table(
    "counter", MetaData(), Column("id", Integer, primary_key=True), Column("n", Integer)
)
POOL: dict[str, Any] = {"pool_size": 5, "max_overflow": 0}


def statement(scope: Any) -> Any:
    """The statement of a request: count up, or look."""
    mine = COUNTER.c.id == int(scope["path"][1:])
    if scope["method"] == "POST":
        return COUNTER.update().where(mine).values(n=COUNTER.c.n + 1).returning(COUNTER.c.n)
    total = select(func.sum(COUNTER.c.n)).scalar_subquery()
    return select(COUNTER.c.n, total).where(mine)


class Package:
    """This package."""

    name = "this package"

    def __init__(self, urls: list[URL]) -> None:
        self.database = AsyncDatabase(urls[0], replicas=urls[1:], **POOL)
        self.app = DBSessionMiddleware(self.answer, self.database, read_only=safe_methods)

    async def answer(self, scope: Any, _receive: Any, send: Any) -> None:
        """Write or read."""
        row = (await self.database.get_session().execute(statement(scope))).one()
        await respond(send, body=" ".join(map(str, row)).encode())

    async def __aenter__(self) -> Self:
        await self.database.startup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.database.shutdown()


class ByHand:
    """A hand-written router that is sticky for some seconds after a write."""

    def __init__(self, urls: list[URL], sticky: float) -> None:
        rule = f"sticky {sticky:g} s" if sticky else "always a replica"
        self.name = f"hand-written, {rule}"
        self.primary, *self.replicas = (create_async_engine(each, **POOL) for each in urls)
        self._sticky = sticky

    async def app(self, scope: Any, _receive: Any, send: Any) -> None:
        """Write or read, on the primary or on any replica."""
        written = float(_cookie(scope, "written") or 0)
        is_write = scope["method"] == "POST"
        engine: AsyncEngine = random.choice(self.replicas)
        if is_write or time.time() - written < self._sticky:
            engine = self.primary
        async with engine.begin() as connection:
            row = (await connection.execute(statement(scope))).one()
        cookie = [(b"set-cookie", f"written={time.time()}".encode())] if is_write else []
        await send({"type": "http.response.start", "status": 200, "headers": cookie})
        await send({"type": "http.response.body", "body": " ".join(map(str, row)).encode()})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for each in (self.primary, *self.replicas):
            await each.dispose()


def _cookie(scope: Any, name: str) -> str:
    text = dict(scope["headers"]).get(b"cookie", b"").decode()
    return dict(each.split("=") for each in text.split("; ") if each).get(name, "")


@dataclass
class Seen:
    """What all clients saw."""

    reads: int = 0
    writes: int = 0
    stale: int = 0
    back: int = 0
    failed: int = 0


async def client(app: Any, number: int, seen: Seen, until: float) -> None:
    """Read, and write now and then."""
    cookies = CookieClient(app)
    mine = highest = 0
    while time.monotonic() < until:
        try:
            if random.random() < 0.1:
                mine = int((await cookies.ask("POST", f"/{number}")).body)
                seen.writes += 1
            n, total = map(int, (await cookies.ask("GET", f"/{number}")).body.split())
        except Exception:  # whatever a router raises where a server is gone
            seen.failed += 1
            await asyncio.sleep(0.01)
            continue
        seen.reads += 1
        seen.stale += n < mine
        seen.back += total < highest
        highest = max(highest, total)
        await asyncio.sleep(random.random() * 0.02)


async def one_second(cluster: Cluster, until: float) -> None:
    """Both replicas are a second behind."""
    cluster.lag(1000)
    await asyncio.sleep(until - time.monotonic())


async def three_seconds(cluster: Cluster, until: float) -> None:
    """Both replicas are three seconds behind."""
    cluster.lag(3000)
    await asyncio.sleep(until - time.monotonic())


async def paused(cluster: Cluster, until: float) -> None:
    """One replica after the other replays nothing for a second."""
    while time.monotonic() < until:
        for each in cluster.replicas:
            await asyncio.to_thread(each.pause)
            await asyncio.sleep(1)
            await asyncio.to_thread(each.resume)


async def killed(cluster: Cluster, until: float) -> None:
    """One replica after the other is killed, and started two seconds later."""
    while time.monotonic() < until:
        for each in cluster.replicas:
            await asyncio.to_thread(each.kill)
            await asyncio.sleep(2)
            await asyncio.to_thread(each.start)
            await asyncio.sleep(1)


FAULTS: dict[str, Callable[[Cluster, float], Awaitable[None]]] = {
    "both replicas 1 s behind": one_second,
    "both replicas 3 s behind": three_seconds,
    "replay paused in turn": paused,
    "replicas killed in turn": killed,
}


async def count(cluster: Cluster, urls: list[URL], faults: list[str], seconds: float) -> None:
    """Print what clients see under each fault, by each router."""
    print("| fault | router | reads | stale | steps back | failed |\n|---|---|---|---|---|---|")
    for fault in faults:
        for make in (Package, lambda urls: ByHand(urls, 2), lambda urls: ByHand(urls, 0)):
            _reset(cluster)
            async with make(urls) as router:
                seen, until = Seen(), time.monotonic() + seconds
                clients = (client(router.app, each, seen, until) for each in range(CLIENTS))
                await asyncio.gather(FAULTS[fault](cluster, until), *clients)
            print(
                f"| {fault} | {router.name} | {seen.reads:,} | {seen.stale:,} | {seen.back:,} "
                f"| {seen.failed:,} |",
                flush=True,
            )
    _reset(cluster)


def _reset(cluster: Cluster) -> None:
    for each in cluster.replicas:
        each.resume()
    cluster.lag(0)
    cluster.primary.at("bench").ask("UPDATE counter SET n = 0")
    cluster.catch_up()


async def read_in_parallel(urls: list[URL], query: str, seconds: float) -> float:
    """How many reads a second 60 clients get."""
    database = AsyncDatabase(urls[0], replicas=urls[1:], **POOL)

    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        await database.get_session().execute(text(query))
        await respond(send)

    app = DBSessionMiddleware(answer, database, read_only=safe_methods)
    done = 0

    async def work(until: float) -> None:
        nonlocal done
        while time.monotonic() < until:
            await Exchange(app).run()
            done += 1

    async with database:
        await asyncio.gather(*(work(time.monotonic() + 0.5) for _ in range(60)))
        done = 0
        await asyncio.gather(*(work(time.monotonic() + seconds) for _ in range(60)))
    return done / seconds


async def one_client(urls: list[URL], method: str, requests: int) -> float:
    """Microseconds of a request of one client, the median of 20 rounds."""
    rounds = []
    async with Package(urls) as router:
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(requests):
                await Exchange(router.app, "/1", method=method).run()
            rounds.append((time.perf_counter() - start) / requests)
    return sorted(rounds)[10] * 1e6


async def measure(urls: list[URL], seconds: float) -> None:
    """Print the throughput of reads, and the cost of replicas."""
    queries = {
        "10 ms of waiting": "SELECT pg_sleep(0.01)",
        "work on the processor": "SELECT sum(n) FROM generate_series(1, 20000) AS n",
    }
    print("\n| reads per second of 60 clients | primary alone | 1 replica | 2 replicas |")
    print("|---|---|---|---|")
    for name, query in queries.items():
        found = [await read_in_parallel(urls[:each], query, seconds) for each in (1, 2, 3)]
        print(f"| {name} | {' | '.join(f'{each:,.0f}' for each in found)} |", flush=True)
    print("\n| one client, microseconds | without replicas | with two |\n|---|---|---|")
    for name, method in (("a read", "GET"), ("a write", "POST")):
        found = [await one_client(urls[:each], method, 100) for each in (1, 3)]
        print(f"| {name} | {' | '.join(f'{each:,.0f}' for each in found)} |", flush=True)


def main(fault: str | None, seconds: float) -> None:
    """Run everything, or one fault."""
    cluster = Cluster()
    url = cluster.database("bench")
    engine = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    COUNTER.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(COUNTER.insert(), [{"id": each, "n": 0} for each in range(CLIENTS)])
    cluster.catch_up()
    servers = (cluster.primary, *cluster.replicas)
    urls = [each.url.set(drivername="postgresql+asyncpg", database="bench") for each in servers]
    asyncio.run(count(cluster, urls, [fault] if fault else list(FAULTS), seconds))
    if fault is None:
        asyncio.run(measure(urls, seconds / 4))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=22, help="for each router and fault")
    parser.add_argument("--fault", choices=FAULTS, help="only this one")
    arguments = parser.parse_args()
    main(arguments.fault, arguments.seconds)
