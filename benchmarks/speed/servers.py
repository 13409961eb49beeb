"""Runs server processes for the applications, and sends them requests."""

import asyncio
import http.client
import json
import os
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

from benchmarks.faults.cluster import HOST

from .turns import Ask

ROOT = Path(__file__).parents[2]
_PATIENCE = 30.0  # seconds


def environment(url: str, pool_size: int) -> dict[str, str]:
    """Return the environment of an application's process."""
    pool = {"POOL_SIZE": str(pool_size), "POOL_TIMEOUT": "60"}
    return os.environ | pool | {"DATABASE_URL": url, "PYTHONPATH": str(ROOT)}


class Server:
    """One server process; `port` is where it listens."""

    def __init__(self, port: int) -> None:
        self.port: int = port

    def measured(self, path: str = "/measured") -> Any:
        """Return what the process holds; see `server.Door`."""
        with closing(http.client.HTTPConnection(HOST, self.port, timeout=_PATIENCE)) as connection:
            connection.request("GET", path)
            return json.load(connection.getresponse())

    def asking(self, method: str, path: str) -> Ask:
        """Return a function that sends this request with `http.client` over one connection."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_PATIENCE)

        async def ask() -> None:  # blocks nothing, because nothing else runs on this loop
            connection.request(method, path)
            response = connection.getresponse()
            response.read()
            if response.status >= 400:
                raise RuntimeError(f"{path} was answered {response.status}")

        return ask

    async def settle(self) -> None:
        """Wait until the server has noticed that clients disconnected."""
        for _ in range(200):
            if not (await asyncio.to_thread(self.measured))["checked out"]:
                return
            await asyncio.sleep(0.05)


@asynccontextmanager
async def running_servers(
    tools: Iterable[str], url: str, pool_size: int
) -> AsyncIterator[dict[str, Server]]:
    """Run a server for each application inside the block."""
    tools = list(tools)
    async with AsyncExitStack() as stack:
        started = [stack.enter_async_context(_running(tool, url, pool_size)) for tool in tools]
        servers = await asyncio.gather(*started)
        yield dict(zip(tools, servers, strict=True))


@asynccontextmanager
async def _running(tool: str, url: str, pool_size: int) -> AsyncIterator[Server]:
    command = (sys.executable, "-m", "benchmarks.speed.server", tool)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, cwd=ROOT, env=environment(url, pool_size)
    )
    try:
        if process.stdout is None:
            raise RuntimeError("it prints nothing")
        async with asyncio.timeout(_PATIENCE):
            server = Server(int(await process.stdout.readline()))
            while not await _answers(server):
                await asyncio.sleep(0.02)
        yield server
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _answers(server: Server) -> bool:
    try:
        await asyncio.to_thread(server.measured)
    except OSError:
        return False
    return True
