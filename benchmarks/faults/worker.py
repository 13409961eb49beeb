"""Serves an application of `benchmarks.peers` in a worker process."""

import asyncio
import gc
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any


def application() -> Any:
    """Return the application that the variable `TOOL` names; for `uvicorn --factory`."""
    peer: Any = import_module(f"benchmarks.peers.{os.environ['TOOL']}")
    return Door(peer.app, peer.pool)


class Door:
    """Reports the state of the pool, and cancels requests that ask for it.

    `GET /status` and `GET /usage` are answered here. A request with the header `x-cancel-after` is
    cancelled after so many seconds, as by a middleware with a time limit. The answer is then a 504,
    even if work was stored before.
    """

    def __init__(self, app: Any, pool: Any) -> None:
        self.app: Any = app
        self.pool: Any = pool

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one ASGI scope."""
        if scope.get("path") == "/status":
            status = {"held": self.pool().checkedout(), "pid": os.getpid()}
            await _answer(send, 200, json.dumps(status).encode())
            return
        if scope.get("path") == "/usage":
            await _answer(send, 200, json.dumps(self._usage()).encode())
            return
        limit = dict(scope.get("headers", ())).get(b"x-cancel-after")
        if limit is None:
            await self.app(scope, receive, send)
            return
        started = False

        async def note_start_then_send(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(float(limit)):
                await self.app(scope, receive, note_start_then_send)
        except TimeoutError:
            if started:
                raise  # the server closes the connection
            await _answer(send, 504, b"cancelled")

    def _usage(self) -> dict[str, Any]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "pid": os.getpid(),
            "memory": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
            "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            "tasks": len(asyncio.all_tasks()),
            "connections": self.pool().checkedin() + self.pool().checkedout(),
        }


async def _answer(send: Any, status: int, body: bytes) -> None:
    length = str(len(body)).encode()
    headers = [(b"content-length", length), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
