"""Measures the time of each request, and how long the request holds a connection."""

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

from .clients import download_slowly
from .servers import ROOT, Server, environment
from .size import Size
from .turns import SCENARIOS, Rounds, compare, in_turn, spread

_POOL = 2  # one tool needs so many connections to start


async def printed_by(url: str, pool_size: int, *arguments: str) -> Any:
    """Return the JSON that a module of this benchmark prints in a separate process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=environment(url, pool_size),
    )
    printed, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{arguments} failed")
    return json.loads(printed.splitlines()[-1])


async def in_process(tools: list[str], size: Size, url: str) -> dict[str, Any]:
    """Return the microseconds of a request, with only the application in the process."""
    arguments = ("benchmarks.speed.in_process", str(size.rounds), str(size.turn))
    found: dict[str, Rounds] = await printed_by(url, _POOL, "-m", *arguments, *tools)
    return {scenario: compare(rounds) for scenario, rounds in found.items()}


async def over_http(servers: Mapping[str, Server], size: Size) -> dict[str, Any]:
    """Return the microseconds of a request for a client that stays connected."""
    found = {}
    for scenario, (method, path) in SCENARIOS.items():
        asks = {tool: server.asking(method, path) for tool, server in servers.items()}
        found[scenario] = compare(await in_turn(asks, size.rounds // 2 + 1, size.turn))
    return found


async def held(servers: Mapping[str, Server], size: Size) -> dict[str, Any]:
    """Return the milliseconds for which a connection is checked out."""
    found: dict[str, Any] = {}
    for scenario, (method, path) in list(SCENARIOS.items())[1:]:
        _forget(servers)
        asks = {tool: server.asking(method, path) for tool, server in servers.items()}
        await in_turn(asks, size.rounds // 4 + 1, size.turn)
        found[scenario] = _spreads(servers)
    _forget(servers)
    # They mostly wait, so all of them can run at once.
    await asyncio.gather(*(download_slowly(each.port, size.download) for each in servers.values()))
    for server in servers.values():
        await server.settle()
    found["a download of 400 kB at 100 kB/s"] = _spreads(servers)
    return found


def _forget(servers: Mapping[str, Server]) -> None:
    for server in servers.values():
        server.measured("/forget")


def _spreads(servers: Mapping[str, Server]) -> dict[str, Any]:
    return {
        tool: spread([each * 1e3 for each in server.measured()["held"]])
        for tool, server in servers.items()
    }
