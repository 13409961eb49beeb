"""What a request costs with the middleware, against the same application written by hand.

    python benchmarks/overhead.py

In process, on the PostgreSQL that the test dependencies bring along. A few requests of one are
followed by a few of the other, some hundred times, so that whatever else the machine does meets
both: what counts is the ratio, and the microseconds only as their difference.
"""

import argparse
import asyncio
import gc
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Integer, insert, select, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import postgres

Client = Callable[[str], Awaitable[None]]


class Base(DeclarativeBase):
    """Of the one table."""


class Entry(Base):
    """A row to read and to write."""

    __tablename__ = "entry"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    value: Mapped[int]


async def nothing(request: Request) -> Response:
    """Use no database."""
    return PlainTextResponse("ok")


def with_middleware(database: AsyncDatabase) -> Any:
    """The application as a user of this package writes it."""

    async def read(request: Request) -> Response:
        value = await get_session().scalar(select(Entry.value).where(Entry.id == 1))
        return PlainTextResponse(str(value))

    async def write(request: Request) -> Response:
        await get_session().execute(insert(Entry).values(value=7))
        return PlainTextResponse("ok", 201)

    app = Starlette(
        routes=[Route("/nothing", nothing), Route("/read", read), Route("/write", write)]
    )
    app.add_middleware(DBSessionMiddleware, database)
    return app


def by_hand(sessions: "async_sessionmaker[Any]") -> Any:
    """The same application with the pattern of SQLAlchemy's documentation in each handler."""

    async def read(request: Request) -> Response:
        async with sessions() as session, session.begin():
            value = await session.scalar(select(Entry.value).where(Entry.id == 1))
        return PlainTextResponse(str(value))

    async def write(request: Request) -> Response:
        async with sessions() as session, session.begin():
            await session.execute(insert(Entry).values(value=7))
        return PlainTextResponse("ok", 201)

    return Starlette(
        routes=[Route("/nothing", nothing), Route("/read", read), Route("/write", write)]
    )


def client_of(app: Any) -> Client:
    """Call an application in process, with as little as possible around it."""
    messages = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal messages
        messages += 1

    async def get(path: str) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        before = messages
        await app(scope, receive, send)
        if messages - before != 2:
            raise RuntimeError("the application did not answer")

    return get


async def measure(client: Client, path: str, requests: int) -> float:
    """Microseconds per request."""
    start = time.perf_counter()
    for _ in range(requests):
        await client(path)
    return (time.perf_counter() - start) / requests * 1e6


async def main(rounds: int) -> None:
    """Print a table of medians, and of the ratio of each pair of neighbours."""
    url = postgres.new_database("overhead").set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Entry).values(id=1, value=1))
        await connection.execute(text("SELECT setval('entry_id_seq', 1)"))
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    autocommit = AsyncDatabase(url, isolation_level="AUTOCOMMIT")
    async with AsyncDatabase(url) as database, autocommit:
        hand, usual = client_of(by_hand(sessions)), client_of(with_middleware(database))
        reading = client_of(with_middleware(autocommit))
        print(f"Python {sys.version.split()[0]}, SQLAlchemy {sqlalchemy.__version__}, asyncpg,")
        print(
            f"{rounds} rounds in turn; median of each, and of the ratio pair by pair (quartiles)\n"
        )
        print(f"{'request':18}{'by hand':>12}{'middleware':>12}{'more':>10}{'ratio':>8}")
        for name, path, requests, ours in (
            ("nothing", "/nothing", 500, usual),
            ("read", "/read", 10, usual),
            ("read, autocommit", "/read", 10, reading),
            ("write", "/write", 10, usual),
        ):
            await measure(hand, path, 200), await measure(ours, path, 200)
            gc.collect()
            pairs = []
            for number in range(rounds):
                order = (hand, ours) if number % 2 else (ours, hand)
                times = {client: await measure(client, path, requests) for client in order}
                pairs.append((times[hand], times[ours]))
            before = statistics.median(pair[0] for pair in pairs)
            after = statistics.median(pair[1] for pair in pairs)
            low, ratio, high = statistics.quantiles([our / by for by, our in pairs], n=4)
            print(
                f"{name:18}{before:9.1f} µs{after:9.1f} µs{after - before:+7.1f} µs"
                f"{ratio:8.3f} ({low:.3f} to {high:.3f})"
            )
    await engine.dispose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=501, help="pairs measured per row")
    asyncio.run(main(parser.parse_args().rounds))
