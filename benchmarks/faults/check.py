"""Runs the same cases with as little as possible around them: one request, in this process.

    python -m benchmarks.faults.check TOOL URL

No server, no socket, no proxy, no other client: what is still wrong here is the tool's.
"""

import asyncio
import importlib
import json
import os
import sys
from typing import Any

import psycopg

_THEN = {
    "the handler refuses": "refuse",
    "the handler fails": "raise",
    "a swallowed error aborts the transaction": "swallow",
    "COMMIT fails": "failing%20commit",
    "the connection dies in COMMIT": "dying%20commit",
}
_IN_COMMIT = "cancelled in COMMIT"
_AT_FIRST = "twenty are cancelled within two milliseconds, and twenty others are not"
_IN_STREAM = "fifty clients leave in a stream"
CASES = (*_THEN, _IN_COMMIT, _AT_FIRST, _IN_STREAM)


async def check(tool: str, url: str) -> dict[str, str]:
    """Return the errors of each case, in words; an empty list is good."""
    os.environ["DATABASE_URL"] = url
    peer: Any = importlib.import_module(f"benchmarks.peers.{tool}")
    reader = _Reader(url)
    words: dict[str, str] = {}
    async with _Lifespan(peer.app):
        for number, (case, then) in enumerate(_THEN.items(), 1):
            exchange = await _Exchange(_write(number, then)).run(peer.app)
            words[case] = await _words({number: exchange.status}, reader, peer)

        exchange = _Exchange(_write(50, "slow%20commit"))
        task = asyncio.create_task(exchange.run(peer.app))
        while not reader.sees_commit() and not task.done():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        # If no success was sent, no client was told anything: 0.
        told = exchange.status if exchange.status < 400 else 0
        words[_IN_COMMIT] = await _words({50: told}, reader, peer)

        others = {}
        for number in range(100, 140, 2):
            exchange = _Exchange(_write(number, "wait%20long"))
            task = asyncio.create_task(exchange.run(peer.app))
            await asyncio.sleep((number - 100) / 2 * 0.0001)
            task.cancel()
            await asyncio.wait([task])
            others[number + 1] = (await _Exchange(_write(number + 1)).run(peer.app)).status
        words[_AT_FIRST] = await _words(others, reader, peer)

        for number in range(50):
            await _Exchange(("GET", "/stream", ""), leave_at=number % 9 + 1).run(peer.app)
        words[_IN_STREAM] = await _words({}, reader, peer)
    return words


def _write(number: int, then: str = "") -> tuple[str, str, str]:
    return "POST", f"/entries/{number}", f"then={then}"


async def _words(statuses: dict[int, int], reader: "_Reader", peer: Any) -> str:
    await asyncio.sleep(0.3)
    there = reader.stored()
    lost = sum(0 < status < 400 and number not in there for number, status in statuses.items())
    phantom = sum(status >= 400 and number in there for number, status in statuses.items())
    amounts = {"lost": lost, "phantom": phantom, "held": peer.pool().checkedout()}
    return ", ".join(f"{amount} {name}" for name, amount in amounts.items() if amount)


class _Exchange:
    """Send one HTTP request, and return the status of the response; 500 if the application raised.

    Args:
        asked: The method, the path and the query.
        leave_at: The number of the body part at which the client disconnects; 0 for never.
    """

    def __init__(self, asked: tuple[str, str, str], *, leave_at: int = 0) -> None:
        self.method, self.path, self.query = asked
        self.status = 0
        self._leave_at = leave_at
        self._left = asyncio.Event()
        self._asked = False

    async def run(self, app: Any) -> "_Exchange":
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query.encode(),
            "root_path": "",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        try:
            await app(scope, self._receive, self._send)
        except Exception:
            self.status = self.status or 500
        return self

    async def _receive(self) -> Any:
        if self._asked:
            await self._left.wait()
            return {"type": "http.disconnect"}
        self._asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        if message.get("body"):
            self._leave_at -= 1
            if self._leave_at == 0:
                self._left.set()


class _Lifespan:
    """Run the application from its startup to its shutdown."""

    def __init__(self, app: Any) -> None:
        self._app: Any = app
        self._in: asyncio.Queue[Any] = asyncio.Queue()
        self._out: asyncio.Queue[Any] = asyncio.Queue()

    async def __aenter__(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._task = asyncio.create_task(self._app(scope, self._in.get, self._out.put))
        await self._in.put({"type": "lifespan.startup"})
        await self._out.get()

    async def __aexit__(self, *_: object) -> None:
        await self._in.put({"type": "lifespan.shutdown"})
        await self._task


class _Reader:
    """Another connection, which sees stored rows, and sees when a COMMIT runs."""

    def __init__(self, url: str) -> None:
        address = "postgresql" + url[url.index("://") :]
        self._connection = psycopg.connect(address, autocommit=True)

    def stored(self) -> set[int]:
        return {number for (number,) in self._connection.execute("SELECT number FROM entry")}

    def sees_commit(self) -> bool:
        query = "SELECT FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'COMMIT%'"
        return self._connection.execute(query).fetchone() is not None


if __name__ == "__main__":
    print(json.dumps(asyncio.run(check(*sys.argv[1:]))))
