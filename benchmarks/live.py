"""Measures what `LivePage` costs a request with one SELECT, and a request without a database.

    python -m benchmarks.live
    python -m benchmarks.live --http


One process serves the same application three times, in turn: without a page, with a page, and with
`on_report`. Each has a database object of its own for the same PostgreSQL database. With `--http`,
one uvicorn each serves the first two, and a client asks them in turn. The figures are medians; the
ratios are those of each round.
"""

import asyncio
import socket
import statistics
import sys
import time
from argparse import ArgumentParser
from contextlib import AsyncExitStack, suppress
from http.client import HTTPConnection
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import postgres
import uvicorn
from sqlalchemy import URL, Column, Integer, MetaData, Table, create_engine, select
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session
from asgi_dbsession.live import LivePage

from .speed.in_process import alive, asking
from .speed.turns import Rounds, in_turn

ENTRY = Table("entry", MetaData(), Column("id", Integer, primary_key=True))
PATHS = {"one SELECT": "/read", "no database use": "/nothing"}


async def read(_request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(await get_session().scalar(select(ENTRY.c.id))))


async def nothing(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("nothing")


def application(database: AsyncDatabase, **options: Any) -> DBSessionMiddleware:
    """Return the application with its middleware."""
    routes = [Route("/read", read), Route("/nothing", nothing)]
    return DBSessionMiddleware(Starlette(routes=routes), database, **options)


async def measure(rounds: int, seconds: float) -> dict[str, Rounds]:
    """Return the microseconds per request of each application; the applications alternate."""
    url = new_database()
    plain, watched, reported = (AsyncDatabase(url) for _ in range(3))
    LivePage(watched)
    apps = {
        "without": application(plain),
        "with LivePage": application(watched),
        "with on_report": application(reported, on_report=lambda _: None),
    }
    async with AsyncExitStack() as stack:
        for app in apps.values():
            await stack.enter_async_context(alive(app))
        return {
            name: await in_turn(
                {each: asking(app, "GET", path) for each, app in apps.items()}, rounds, seconds
            )
            for name, path in PATHS.items()
        }


def new_database() -> URL:
    """A database with an empty table."""
    url = postgres.new_database("live")
    engine = create_engine(url.set(drivername="postgresql+psycopg"))
    ENTRY.metadata.create_all(engine)
    engine.dispose()
    return url.set(drivername="postgresql+asyncpg")


def serve(name: str, url: str, port: int) -> None:
    """Serve one of the applications over HTTP until it is killed."""
    database = AsyncDatabase(url)
    if name == "with LivePage":
        LivePage(database)
    uvicorn.run(application(database), port=port, log_level="critical")


def measure_over_http(rounds: int) -> dict[str, Rounds]:
    """Return the microseconds per request for a client that stays connected."""
    url = new_database().render_as_string(hide_password=False)
    clients: dict[str, HTTPConnection] = {}
    servers: list[Any] = []
    times: Rounds = {}
    for name in ("without", "with LivePage"):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        servers.append(get_context("spawn").Process(target=serve, args=(name, url, port)))
        servers[-1].start()
        clients[name], times[name] = HTTPConnection("127.0.0.1", port), []
    try:
        for client in clients.values():
            _await_answer(client)
        order = list(clients)
        for number in range(rounds + 200):
            for name in order:
                took = _time(clients[name])
                if number >= 200:
                    times[name].append(took)
            order.append(order.pop(0))
    finally:
        for server in servers:
            server.kill()
            server.join()
    return {"one SELECT over HTTP": times}


def _await_answer(client: HTTPConnection) -> None:
    for _ in range(300):
        with suppress(OSError):
            _time(client)
            return
        client.close()
        time.sleep(0.1)
    raise RuntimeError("It does not answer.")


def _time(client: HTTPConnection) -> float:
    start = time.perf_counter()
    client.request("GET", PATHS["one SELECT"])
    client.getresponse().read()
    return (time.perf_counter() - start) * 1e6


if __name__ == "__main__":
    parser = ArgumentParser(prog="python -m benchmarks.live")
    parser.add_argument("--http", action="store_true", help="ask over HTTP")
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=0, help="of one turn; 0: one request")
    arguments = parser.parse_args()
    if arguments.http:
        measured = measure_over_http(arguments.rounds)
    else:
        measured = asyncio.run(measure(arguments.rounds, arguments.seconds))
    for name, found in measured.items():
        print(name)
        for each, times in found.items():
            ratios = [one / other for one, other in zip(times, found["without"], strict=True)]
            took, ratio = statistics.median(times), statistics.median(ratios)
            print(f"  {each:15} {took:7.1f} µs   {ratio:.3f} ×")
