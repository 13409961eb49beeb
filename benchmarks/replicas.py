"""Measures reads with one, two and three servers, and what replicas cost a write.

    python -m benchmarks.replicas
    python -m benchmarks.replicas --fault "both replicas 1 s behind" --seconds 60

The second command counts stale reads under one fault, as `python -m benchmarks.faults --replicas`
does under all faults. All servers and clients share this machine.
"""

import asyncio
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from sqlalchemy import URL, text

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, safe_methods

from .faults.replicas_report import as_table
from .faults.routers import POOL, Package
from .faults.stale_reads import FAULTS, prepare, urls_of, watch_all

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from asgi import Exchange, respond
from replicas import Cluster


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
    """Count what clients see under one fault, or measure."""
    if fault is not None:
        print(as_table(asyncio.run(watch_all([fault], seconds))))
        return
    cluster = Cluster()
    prepare(cluster)
    asyncio.run(measure(urls_of(cluster), seconds / 4))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=22, help="for each router, or each cell")
    parser.add_argument("--fault", choices=FAULTS, help="only this one")
    arguments = parser.parse_args()
    main(arguments.fault, arguments.seconds)
