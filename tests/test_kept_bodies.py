"""Tests how much of request bodies `attempts` keeps, and when the bodies are freed.

Real clients upload to a real server. There is room for one body, so whether another request can run
again says whether the first one is still kept.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from asgi import Exchange, get, respond
from conftest import Running, becomes_true
from test_retry import lose, read

from asgi_dbsession import DBSessionMiddleware
from asgi_dbsession.retry import replay

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("real", ["asyncpg", "psycopg-sync"], indirect=True),
]

BODY = b"x" * 1000
START = {"type": "http.response.start", "status": 200, "headers": []}


class Uploads:
    """An application that meets a conflict in the first run of each path that begins with `/lose`.

    Attributes:
        runs: How often each path ran with its whole body.
        held: The runs, by path and number, that wait for `goes_on`; `reached` says that one does.
    """

    def __init__(self, running: Running) -> None:
        self.running = running
        self.runs: Counter[str] = Counter()
        self.held: set[tuple[str, int]] = set()
        self.reached = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        assert await read(receive) == BODY
        self.runs[path] += 1
        if path == "/streams":
            await send(START)
        elif path == "/commits":
            await self.running.write("stored")
            await self.running.call("commit")
        if (path, self.runs[path]) in self.held:
            self.reached.set()
            await self.goes_on.wait()
        if path == "/streams":
            await send({"type": "http.response.body", "body": b"end"})
            return
        if path == "/raises":
            raise LookupError
        if path.startswith("/lose") and self.runs[path] == 1:
            await lose(self.running)
        await respond(send, 201)


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[Callable[[str], Coroutine[Any, Any, int]]]:
    """Serve with uvicorn; gives a function that uploads to a path and returns the status."""
    config = uvicorn.Config(
        app, port=0, lifespan="off", log_level="critical", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await becomes_true(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]

    async def upload(path: str) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(BODY)}\r\n\r\n"
        try:
            writer.write(head.encode() + BODY[:500])
            await asyncio.sleep(0.01)
            writer.write(BODY[500:])
            return int((await reader.readline()).split()[1])
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    try:
        yield upload
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
def uploads(running: Running, monkeypatch: pytest.MonkeyPatch) -> Uploads:
    """The application, and room for one body."""
    monkeypatch.setattr(replay, "MEMORY_LIMIT", len(BODY))
    return Uploads(running)


def protect(uploads: Uploads, attempts: int = 3) -> DBSessionMiddleware:
    return DBSessionMiddleware(uploads, uploads.running.database, attempts=attempts)


@pytest.mark.parametrize("room", [0, 3, 10])
async def test_only_requests_that_fit_run_again(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Ten clients upload at once; those without room run once, and fail with the conflict."""
    monkeypatch.setattr(replay, "MEMORY_LIMIT", room * len(BODY))
    paths = [f"/lose/{number}" for number in range(10)]
    uploads.held = {(path, 1) for path in paths}
    async with served(protect(uploads)) as upload:
        asked = [asyncio.create_task(upload(path)) for path in paths]
        await becomes_true(lambda: len(uploads.runs) == len(paths))
        uploads.goes_on.set()
        statuses = Counter(await asyncio.gather(*asked))
        assert statuses == {status: n for status, n in ((201, room), (500, 10 - room)) if n}
        assert uploads.runs.total() == 10 + room
        assert await upload("/lose/afterwards") == (201 if room else 500)


async def test_a_request_without_a_body_needs_no_room(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request runs again, although no more of its body can be kept."""
    monkeypatch.setattr(replay, "MEMORY_LIMIT", 0)
    runs: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(await read(receive))
        if len(runs) == 1:
            await lose(running)
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database, attempts=3))
    assert (exchange.status, runs) == (200, [b"", b""])


HELD = [
    ("/lose/first", 1, 500),
    ("/lose/first", 2, 201),
    ("/streams", 1, 201),
    ("/commits", 1, 201),
]


@pytest.mark.parametrize(("path", "run", "other"), HELD)
async def test_a_body_is_kept_only_while_its_request_may_run_again(
    uploads: Uploads, path: str, run: int, other: int
) -> None:
    """The body is freed in the last attempt, after the start of the response, or after COMMIT."""
    uploads.held = {(path, run)}
    async with served(protect(uploads, attempts=2)) as upload:
        first = asyncio.create_task(upload(path))
        await uploads.reached.wait()
        assert await upload("/lose/other") == other
        uploads.goes_on.set()
        assert await first in (200, 201)


@pytest.mark.parametrize("path", ["/answers", "/raises", "/lose"])
async def test_a_body_is_let_go_with_the_end_of_its_request(uploads: Uploads, path: str) -> None:
    """After any end of a request, the next request has the whole memory."""
    async with served(protect(uploads)) as upload:
        await upload(path)
        assert await upload("/lose/other") == 201


async def test_a_body_is_let_go_when_its_request_is_cancelled(uploads: Uploads) -> None:
    """The request may be cancelled at any await."""
    uploads.held = {("/first", 1)}
    middleware = protect(uploads)
    first = Exchange(middleware, "/first", method="POST", content=BODY)
    serving = asyncio.create_task(first.run())
    await uploads.reached.wait()
    serving.cancel()
    await asyncio.wait([serving])
    async with served(middleware) as upload:
        assert await upload("/lose/other") == 201
