"""Measures the memory of streaming clients, and whether abandoned requests leave anything behind.

    python -m benchmarks.memory
    python -m benchmarks.memory --clients 500 --requests 10000

First, clients upload a body to uvicorn and then read a stream that does not end. The figure is the
growth of the server's memory for each client: without the middleware, with it, and with `attempts`.
Second, requests on PostgreSQL are cancelled, each after a random number of event loop iterations,
twenty at a time. Memory, tasks, connections out of the pool, and transactions open on the server
are counted before, in between and afterwards.
"""

import asyncio
import gc
import random
import socket
import sys
from argparse import ArgumentParser
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import postgres
import uvicorn
from asgi import Exchange
from sqlalchemy import (
    URL,
    Column,
    Engine,
    Integer,
    MetaData,
    Table,
    create_engine,
    insert,
    select,
    text as sql,
)
from sqlalchemy.pool import NullPool

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

ENTRY = Table("entry", MetaData(), Column("id", Integer, primary_key=True))
WAYS: dict[str, dict[str, Any] | None] = {
    "without the middleware": None,
    "with the middleware": {},
    "with `attempts=3`": {"attempts": 3},
}
PAGE = 4096 // 1024


async def stream(scope: Any, receive: Any, send: Any) -> None:
    """Read the body, read a row if there is a session, and stream until the client leaves."""
    if scope["type"] != "http":
        raise NotImplementedError  # no lifespan
    while (await receive()).get("more_body", False):
        pass
    if scope["path"] == "/read":
        await get_session().scalar(select(ENTRY.c.id).limit(1))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"first", "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        pass


async def work(scope: Any, receive: Any, send: Any) -> None:
    """Read, write, commit in the middle, write again, and stream two parts."""
    await receive()
    session = get_session()
    await session.scalar(select(ENTRY.c.id).limit(1))
    await session.execute(insert(ENTRY))
    if random.random() < 0.5:
        await session.commit()
        await session.execute(insert(ENTRY))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await session.scalar(select(ENTRY.c.id).limit(1))
    await send({"type": "http.response.body", "body": b"first", "more_body": True})
    await send({"type": "http.response.body", "body": b"last"})


def serve(way: str, url: URL, listening: socket.socket) -> None:
    """Serve the stream, in a process of its own."""
    options = WAYS[way]
    app: Any = stream
    if options is not None:
        app = DBSessionMiddleware(stream, AsyncDatabase(url), **options)
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


@asynccontextmanager
async def served(way: str, url: URL) -> AsyncIterator[tuple[int, int]]:
    """Yield the port and the process of a server."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    process = get_context("spawn").Process(target=serve, args=(way, url, listening))
    process.start()
    try:
        yield listening.getsockname()[1], process.pid or 0
    finally:
        process.terminate()
        process.join()
        listening.close()


def resident(process: int | str) -> int:
    """Return the memory of a process, in KiB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE


async def open_stream(port: int, path: str, size: int) -> asyncio.StreamWriter:
    """Upload a body, and read the first part of the stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {size}\r\n\r\n"
    writer.write(head.encode() + bytes(size))
    await reader.readuntil(b"first")
    return writer


async def memory_per_client(way: str, url: URL, clients: int, size: int) -> float:
    """Return the KiB that a server needs for each streaming client."""
    path = "/" if WAYS[way] is None else "/read"
    async with served(way, url) as (port, process):
        first = [await open_stream(port, path, size) for _ in range(50)]  # what is made once
        before = resident(process)
        more = [await open_stream(port, path, size) for _ in range(clients)]
        await asyncio.sleep(0.5)
        after = resident(process)
        for writer in (*first, *more):
            writer.close()
    return (after - before) / clients


async def abandon(app: Any, requests: int) -> None:
    """Cancel requests, each after a random number of turns, twenty at a time."""
    todo = iter(range(requests))

    async def client() -> None:
        for _ in todo:
            request = asyncio.create_task(Exchange(app, method="POST", content=b"x" * 1000).run())
            for _ in range(random.randrange(80)):
                await asyncio.sleep(0)
            request.cancel()
            if random.random() < 0.3:
                await asyncio.sleep(0)
                request.cancel()
            with suppress(asyncio.CancelledError):
                await request

    await asyncio.gather(*(client() for _ in range(20)))


async def abandoned(url: URL, reader: Engine, requests: int, show: Callable[..., None]) -> None:
    """Show what there is before, in between, and after abandoned requests."""
    database = AsyncDatabase(url, pool_size=5, max_overflow=0)
    app = DBSessionMiddleware(work, database, attempts=3)
    query = sql(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND state <> 'idle'"
    )
    async with database:
        await abandon(app, requests // 5)  # what is made once
        for step in range(5):
            if step:
                await abandon(app, requests // 4)
            gc.collect()
            await asyncio.sleep(0.2)
            pool: Any = database.engine.pool
            with reader.connect() as connection:
                transactions = connection.scalar(query)
            tasks = len(asyncio.all_tasks()) - 1
            memory, objects = resident("self") / 1024, len(gc.get_objects())
            show(
                requests * step // 4,
                f"{memory:.1f}",
                objects,
                tasks,
                pool.checkedout(),
                transactions,
            )


def row(*cells: object) -> None:
    """Print a row of a table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def make_database() -> tuple[URL, Engine]:
    """Make a database with one table."""
    url = postgres.new_database("memory")
    reader = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    ENTRY.metadata.create_all(reader)
    return url.set(drivername="postgresql+asyncpg"), reader


async def main(clients: int, requests: int, sizes: list[int]) -> None:
    """Print both tables."""
    url, reader = make_database()
    row("KiB for each streaming client", *(f"body of {size} KiB" for size in sizes))
    row("---", *("---:" for _ in sizes))
    for way in WAYS:
        found = [await memory_per_client(way, url, clients, size * 1024) for size in sizes]
        row(way, *(f"{each:.1f}" for each in found))
    print()
    row("abandoned requests", "MiB", "objects", "tasks", "connections in use", "open transactions")
    row(*("---:" for _ in range(6)))
    await abandoned(url, reader, requests, row)
    reader.dispose()


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 10, 100])
    arguments = parser.parse_args()
    asyncio.run(main(arguments.clients, arguments.requests, arguments.sizes))
