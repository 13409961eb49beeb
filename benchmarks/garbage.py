"""Measures what Python's garbage collector costs a server with many clients.

    python -m benchmarks.garbage
    python -m benchmarks.garbage --clients 100 --rounds 5 --seconds 2 --thresholds 700 5000

The collector runs when a process has made a number of new objects, its threshold: 700 up to Python
3.12, and 2,000 from Python 3.13 on. Requests that begin in the same moment reach the smaller number
together. Each round starts a server for each application and each threshold, and all of them answer
one SELECT to the clients. The figures are medians of the rounds.
"""

import asyncio
import gc
import os
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .faults.run import running_cluster
from .speed.clients import read_fast
from .speed.servers import Server, running_servers
from .speed.tools import BY_HAND, DEPENDS, OURS, title

TOOLS = (BY_HAND, DEPENDS, OURS)
_POOL = 5


@asynccontextmanager
async def _servers(url: str, threshold: int) -> AsyncIterator[dict[str, Server]]:
    os.environ["GC_THRESHOLD"] = str(threshold)
    async with running_servers(TOOLS, url, _POOL) as servers:
        yield servers


async def main(options: Namespace) -> None:
    """Measure, and print a table."""
    found: dict[tuple[str, int], list[float]] = {
        (tool, each): [] for tool in TOOLS for each in options.thresholds
    }
    async with running_cluster() as cluster:
        await cluster.query("ALTER SYSTEM SET synchronous_commit = off")
        await cluster.query("SELECT pg_reload_conf()")
        for _ in range(options.rounds):
            for threshold in options.thresholds:
                async with _servers(cluster.url("asyncpg"), threshold) as servers:
                    for tool, server in servers.items():
                        load = "/read", options.clients, 1.0, options.seconds
                        found[tool, threshold].append(await read_fast(server.port, *load))
    print(f"Responses per second to {options.clients} clients; the threshold here is", end=" ")
    print(gc.get_threshold()[0])
    for tool in TOOLS:
        rates = (statistics.median(found[tool, each]) for each in options.thresholds)
        texts = (
            f"{rate:,.0f} at {each:,}" for rate, each in zip(rates, options.thresholds, strict=True)
        )
        print(f"{title(tool)}:", ", ".join(texts))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--thresholds", type=int, nargs="+", default=[700, 2_000, 10_000])
    asyncio.run(main(parser.parse_args()))
