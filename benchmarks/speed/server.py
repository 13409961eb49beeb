"""Serves one application with uvicorn, and reports the connections that it holds.

    DATABASE_URL=... python -m benchmarks.speed.server TOOL

The port is printed. What a client does not read soon stays with the application: the socket has
little room, as if a network were in between. The environment variable `GC_THRESHOLD` changes the
first threshold of Python's garbage collector.
"""

import asyncio
import gc
import json
import os
import socket
import sys
import time
from collections import deque
from importlib import import_module
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy import event

_ROOM = 8192  # bytes; Linux doubles it


class Door:
    """Answers `GET /measured` and `GET /forget` itself, and passes on all other requests.

    Args:
        app: The application.
        pool: A function that returns the pool of the started application.
    """

    def __init__(self, app: Any, pool: Any) -> None:
        self.app: Any = app
        self.pool: Any = pool
        self._held: deque[float] = deque(maxlen=1000)
        self._watched: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one ASGI scope."""
        if scope.get("path") not in ("/measured", "/forget"):
            await self.app(scope, receive, send)
            return
        if scope["path"] == "/forget":
            self._watch()
            self._held.clear()
        body = json.dumps(self.measure()).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def measure(self) -> dict[str, Any]:
        """Return the present state, and how long connections were held since `/forget`."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "held": list(self._held),
            "checked out": self.pool().checkedout(),
            "connections": self.pool().checkedin() + self.pool().checkedout(),
            "tasks": len(asyncio.all_tasks()),
            "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            "memory": pages * 4096 / 1e6,
            "pid": os.getpid(),
        }

    def _watch(self) -> None:
        # Not before `/forget`: this package ends a read without a task only if no application
        # listens to the pool. So these listeners would change what is measured.
        if self._watched is self.pool():
            return
        self._watched = self.pool()
        since: dict[int, float] = {}

        def note_checkout(_connection: Any, record: Any, _proxy: Any) -> None:
            since[id(record)] = time.perf_counter()

        def note_checkin(_connection: Any, record: Any) -> None:
            if id(record) in since:
                self._held.append(time.perf_counter() - since.pop(id(record)))

        event.listen(self._watched, "checkout", note_checkout)
        event.listen(self._watched, "checkin", note_checkin)


def main(tool: str) -> None:
    """Serve until the process is killed."""
    gc.set_threshold(int(os.environ.get("GC_THRESHOLD", gc.get_threshold()[0])))
    listener = socket.socket()
    # Connections inherit this option.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
    listener.bind(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    with Path(os.devnull).open("w") as nowhere:  # some tools print more, which nobody reads
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    peer: Any = import_module(f"benchmarks.peers.{tool}")
    config = uvicorn.Config(
        Door(peer.app, peer.pool), log_level="critical", backlog=2048, timeout_keep_alive=60
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1])
