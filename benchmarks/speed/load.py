"""Measures how many requests a small pool can serve, with fast and slow readers."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from .clients import listening, read_fast, read_slowly, time_one
from .servers import Server, running_servers
from .size import Size
from .turns import Rounds, compare, spread

_SOON = 100  # clients at the same time
_FEW = 10  # slow clients of one tool leave before those of the next tool come


async def fast_readers(tools: Iterable[str], size: Size, url: str, pool: int) -> dict[str, Any]:
    """Return the responses per second with one SELECT.

    Each round has processes of its own: one process may be faster than the next one with the same
    code by more than the tools differ, because its memory is laid out in another way.
    """
    found: dict[int, Rounds] = {clients: {tool: [] for tool in tools} for clients in size.clients}
    order = list(tools)
    for _ in range(size.load_rounds):
        async with running_servers(tools, url, pool) as servers:
            for clients, rounds in found.items():
                coming = size.coming if clients > _SOON else 0
                for tool in order:
                    port = servers[tool].port
                    rounds[tool].append(await read_fast(port, "/read", clients, coming, size.load))
        order.append(order.pop(0))
    return {str(clients): compare(rounds) for clients, rounds in found.items()}


async def slow_readers(servers: Mapping[str, Server], size: Size) -> dict[str, Any]:
    """Return the downloads per second to clients that read 100 kB per second each."""
    found = {}
    for clients in size.clients:
        rounds: Rounds = {}
        if clients <= _FEW:
            ports = [server.port for server in servers.values()]
            reading = (read_slowly(port, clients, size.coming, size.slow) for port in ports)
            rounds = dict(zip(servers, await asyncio.gather(*reading), strict=True))
        else:
            for tool, server in servers.items():
                rounds[tool] = await read_slowly(server.port, clients, size.coming, size.slow)
        for server in servers.values():
            await server.settle()
        found[str(clients)] = {tool: {"taken": spread(each)} for tool, each in rounds.items()}
    return found


async def event_streams(servers: Mapping[str, Server], size: Size) -> dict[str, Any]:
    """Return how many listeners get an event, what they hold, and how long others wait."""
    found = {}
    for tool, server in servers.items():
        async with listening(server.port, size.listeners, size.patience) as heard:
            one_more = await time_one(server.port, "/read", size.patience)
            measured = await asyncio.to_thread(server.measured)
        found[tool] = {
            "heard": heard,
            "connections held": measured["checked out"],
            "one more SELECT": one_more,
        }
    return found
