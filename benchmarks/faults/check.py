"""The same cases once more with next to nothing around them: one request, in this process.

    python -m benchmarks.faults.check TOOL URL

No server, no socket, no proxy, no other client: what is still wrong here is the tool's.
"""

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import psycopg

CASES = (
    "the handler refuses",
    "the handler fails",
    "a swallowed error aborts the transaction",
    "COMMIT fails",
    "the connection dies in COMMIT",
    "cancelled in COMMIT",
    "cancelled in a statement, and ten requests after it",
)
_THEN = {
    "the handler refuses": "refuse",
    "the handler fails": "raise",
    "a swallowed error aborts the transaction": "swallow",
    "COMMIT fails": "failing%20commit",
    "the connection dies in COMMIT": "dying%20commit",
    "cancelled in COMMIT": "slow%20commit",
}


async def check(tool: str, url: str) -> dict[str, str]:
    """What went wrong in each case, in words; empty is good."""
    os.environ["DATABASE_URL"] = url
    peer: Any = importlib.import_module(f"benchmarks.peers.{tool}")
    stored = _reader_of(url)
    words: dict[str, str] = {}
    async with _Lifespan(peer.app):
        await _ask(peer.app, 1, "")  # the pool is warm from here on
        for number, case in enumerate(CASES[:-1], 10):
            limit = 0.05 if case == "cancelled in COMMIT" else None
            status = await _ask(peer.app, number, _THEN[case], limit)
            words[case] = await _words({number: status}, stored, limit is None, peer)
        await _ask(peer.app, 100, "wait%20long", 0.05)
        after = {number: await _ask(peer.app, number, "") for number in range(101, 111)}
        words[CASES[-1]] = await _words(after, stored, True, peer)
    return words


async def _words(
    statuses: dict[int, int], stored: Callable[[], set[int]], errors_count: bool, peer: Any
) -> str:
    await asyncio.sleep(0.3)
    there = stored()
    lost = sum(0 < status < 400 and number not in there for number, status in statuses.items())
    phantom = sum(status >= 400 and number in there for number, status in statuses.items())
    amounts = {"lost": lost, "phantom": errors_count * phantom, "held": peer.pool().checkedout()}
    return ", ".join(f"{amount} {name}" for name, amount in amounts.items() if amount)


async def _ask(app: Any, number: int, then: str, cancel_after: float | None = None) -> int:
    """The status that the application sent; 500 where it raised, 0 where it sent none."""
    status = 0
    path = f"/entries/{number}"

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": f"then={then}".encode(),
        "root_path": "",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    try:
        async with asyncio.timeout(cancel_after):
            await app(scope, receive, send)
    except TimeoutError:
        return status
    except Exception:
        return status or 500
    return status


class _Lifespan:
    """The application between its startup and its shutdown."""

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


def _reader_of(url: str) -> Callable[[], set[int]]:
    address = "postgresql" + url[url.index("://") :]

    def stored() -> set[int]:
        with psycopg.connect(address) as connection:
            return {number for (number,) in connection.execute("SELECT number FROM entry")}

    return stored


if __name__ == "__main__":
    print(json.dumps(asyncio.run(check(*sys.argv[1:]))))
