"""Measures applications in one process, with as little as possible around them.

DATABASE_URL=... python -m benchmarks.speed.in_process ROUNDS SECONDS TOOL...
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from typing import Any

from .turns import SCENARIOS, Ask, Rounds, in_turn

_SCOPE: dict[str, Any] = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "scheme": "http",
    "query_string": b"",
    "root_path": "",
    "headers": [(b"host", b"127.0.0.1")],
    "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 80),
}


@asynccontextmanager
async def alive(app: Any) -> AsyncIterator[None]:
    """Run the lifespan of an application around the block."""
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    outbox: asyncio.Queue[Any] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
    task = asyncio.create_task(app(scope, inbox.get, outbox.put))
    for phase in ("startup", "shutdown"):
        await inbox.put({"type": f"lifespan.{phase}"})
        message = await outbox.get()
        if message["type"] != f"lifespan.{phase}.complete":
            raise RuntimeError(message)
        if phase == "startup":
            yield
    await task


def asking(app: Any, method: str, path: str) -> Ask:
    """Return a function that sends this request, and fails without a complete success response."""
    asked = {**_SCOPE, "method": method, "path": path, "raw_path": path.encode()}

    async def ask() -> None:
        status, ended, has_body = 0, False, True

        async def receive() -> dict[str, Any]:
            nonlocal has_body
            if has_body:
                has_body = False
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.get_running_loop().create_future()  # no client disconnects
            raise RuntimeError("somebody did")

        async def send(message: Any) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                ended = True

        await app(dict(asked), receive, send)
        if not ended or status >= 400:
            raise RuntimeError(f"{path} was answered {status}")

    return ask


async def measure(rounds: int, seconds: float, tools: list[str]) -> dict[str, Rounds]:
    """Measure all scenarios; the tools alternate."""
    found = {}
    async with AsyncExitStack() as stack:
        apps = {}
        for tool in tools:
            apps[tool] = import_module(f"benchmarks.peers.{tool}").app
            await stack.enter_async_context(alive(apps[tool]))
        for name, (method, path) in SCENARIOS.items():
            asks = {tool: asking(app, method, path) for tool, app in apps.items()}
            found[name] = await in_turn(asks, rounds, seconds)
    return found


if __name__ == "__main__":
    rounds, seconds, *tools = sys.argv[1:]
    print(json.dumps(asyncio.run(measure(int(rounds), float(seconds), tools))))
