"""Measures on this machine what the model predicts: a real server, and clients that ask on."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.faults.run import running_cluster
from benchmarks.speed.clients import ask_on, download_slowly, read_slowly
from benchmarks.speed.machine import described
from benchmarks.speed.servers import Server, running_servers

OURS, HELD = "asgi_dbsession", "depends"
POOLS, CLIENTS = (1, 2, 5, 10), (1, 10, 100, 1000)
SLOW_POOLS, SLOW_CLIENTS = (5, 10), (10, 100)
LARGE = 20  # a pool that the model is not validated with, only given times of
NOTHING, READ, WAIT = "no database use", "one SELECT", "a query of 500 ms"
_REQUESTS = {
    NOTHING: ("GET", "/nothing"),
    READ: ("GET", "/read"),
    WAIT: ("POST", "/entries/0?then=wait%20long"),
}
_SETTINGS = ("ALTER SYSTEM SET synchronous_commit = off", "SELECT pg_reload_conf()")


async def measure(rounds: int, seconds: float, slow: int) -> dict[str, Any]:
    """Times of one request alone, and responses per second to many.

    Args:
        rounds: How often each is measured. The best counts: other load can only slow down.
        seconds: How long, each time; the slow query takes eight times as long.
        slow: Seconds of slow readers.
    """
    async with running_cluster() as cluster:
        for setting in _SETTINGS:
            await cluster.query(setting)
        url = cluster.url("asyncpg")
        async with _servers(url, (*POOLS, LARGE), OURS, HELD) as servers:
            ours = {size: servers[OURS, size] for size in POOLS}
            found = {
                "alone": await _alone(ours[max(POOLS)], rounds, seconds),
                "in_a_crowd": await _in_a_crowd(servers[OURS, LARGE], rounds, seconds),
                "responses": await _fast(ours, rounds, seconds),
                "held": await _held_by_download(servers),
                "downloads": await _downloads(servers, slow),
            }
        found["responses"] += await _waiting(url, seconds * 8)
    return {**described(), **found}


@asynccontextmanager
async def _servers(
    url: str, sizes: Sequence[int], *tools: str
) -> AsyncIterator[dict[tuple[str, int], Server]]:
    """A server for each tool and each size of the pool."""
    async with AsyncExitStack() as stack:
        found = {}
        for size in sizes:
            servers = await stack.enter_async_context(running_servers(tools, url, size))
            found.update({(tool, size): server for tool, server in servers.items()})
        yield found


async def _alone(server: Server, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """What one request takes of one client, of the server's processor, and of the client's.

    All three of the fastest round, so that they belong together.
    """
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in _REQUESTS}
    for _ in range(rounds):
        for name, request in _REQUESTS.items():
            long = seconds * 8 if name == WAIT else seconds
            found[name].append(await _one_at_a_time(server, request, long))
    return {
        name: dict(zip(("taken", "server", "client"), min(rounds_of_it), strict=True))
        for name, rounds_of_it in found.items()
    }


async def _one_at_a_time(
    server: Server, request: tuple[str, str], seconds: float
) -> tuple[float, float, float]:
    await ask_on(server.port, request, 1, 0, 0.2)
    server_seconds = await _processor_of(server)
    before, own = server_seconds(), time.process_time()
    taken = await ask_on(server.port, request, 1, 0, seconds)
    own = time.process_time() - own
    server_took = server_seconds() - before
    return statistics.mean(taken), server_took / len(taken), own / len(taken)


async def _in_a_crowd(server: Server, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """What a request takes of the server's processor, for each number of clients."""
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name in (NOTHING, READ):
            for clients in CLIENTS:
                rate, busy = await _rate(server, name, clients, seconds)
                found.setdefault((name, clients), []).append(busy / rate)
    return {
        name: {str(clients): min(found[name, clients]) for clients in CLIENTS}
        for name in (NOTHING, READ)
    }


async def _fast(servers: dict[int, Server], rounds: int, seconds: float) -> list[Any]:
    """Responses per second to one SELECT, for each pool and number of clients."""
    cells: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for clients in CLIENTS:
            for size, server in servers.items():
                rate = await _rate(server, READ, clients, seconds)
                cells.setdefault((size, clients), []).append(rate)
    return [_cell(READ, *cell, found) for cell, found in sorted(cells.items())]


async def _waiting(url: str, seconds: float) -> list[Any]:
    """The same with a query that mostly waits: all servers are asked at once, but by the crowd.

    New servers each time, because requests stay in the queue when their clients have left.
    """
    cells: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for clients in CLIENTS:
        async with _servers(url, POOLS, OURS) as servers:
            at_once = asyncio.Semaphore(1 if clients == max(CLIENTS) else len(servers))

            async def ask(server: Server, clients: int, at_once: asyncio.Semaphore) -> Any:
                async with at_once:
                    return await _rate(server, WAIT, clients, seconds)

            asking = (ask(server, clients, at_once) for server in servers.values())
            for (_, size), rate in zip(servers, await asyncio.gather(*asking), strict=True):
                cells.setdefault((size, clients), []).append(rate)
    return [_cell(WAIT, *cell, found) for cell, found in sorted(cells.items())]


def _cell(name: str, size: int, clients: int, found: list[tuple[float, float]]) -> dict[str, Any]:
    measured, busy = max(found)
    return {
        "request": name,
        "pool": size,
        "clients": clients,
        "measured": measured,
        "all": [rate for rate, _ in found],
        "processor": busy,
    }


async def _rate(server: Server, name: str, clients: int, seconds: float) -> tuple[float, float]:
    """Responses per second, and the share of a processor that the server had meanwhile."""
    coming = 0.3
    if clients == max(CLIENTS):
        # Each of them waits for more than half a second.
        coming, seconds = 3.0, max(seconds, 2.0)
    server_seconds = await _processor_of(server)
    asking = asyncio.create_task(ask_on(server.port, _REQUESTS[name], clients, coming, seconds))
    await asyncio.sleep(coming)
    before, start = server_seconds(), time.monotonic()
    await asyncio.sleep(seconds)
    busy = (server_seconds() - before) / (time.monotonic() - start)
    return len(await asking) / seconds, busy


async def _held_by_download(servers: dict[tuple[str, int], Server]) -> dict[str, float]:
    """The seconds for which one slow download holds a connection."""
    found = {tool: servers[tool, max(POOLS)] for tool in (OURS, HELD)}
    for server in found.values():
        await asyncio.to_thread(server.measured, "/forget")
    await asyncio.gather(*(download_slowly(each.port, 60) for each in found.values()))
    for server in found.values():
        await server.settle()
    return {
        tool: statistics.median((await asyncio.to_thread(server.measured))["held"])
        for tool, server in found.items()
    }


async def _downloads(servers: dict[tuple[str, int], Server], seconds: int) -> list[Any]:
    """Downloads per second to slow readers; they mostly wait, so all servers are asked at once."""
    found = []
    cells = [(tool, size) for size in SLOW_POOLS for tool in (OURS, HELD)]
    for clients in SLOW_CLIENTS:
        reading = (
            read_slowly(servers[cell].port, clients, seconds // 2, seconds) for cell in cells
        )
        for (tool, size), rates in zip(cells, await asyncio.gather(*reading), strict=True):
            row = {"tool": tool, "pool": size, "clients": clients}
            found.append({**row, "measured": statistics.mean(rates)})
    return found


async def _processor_of(server: Server) -> Callable[[], float]:
    """A function that returns for how many seconds the server has had a processor so far."""
    pid = (await asyncio.to_thread(server.measured))["pid"]
    file = Path(f"/proc/{pid}/schedstat")
    return lambda: int(file.read_text().split()[0]) / 1e9
