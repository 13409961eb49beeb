"""Measures what `LivePage` costs a request with one SELECT, and a request without a database.

    python -m benchmarks.live
    python -m benchmarks.live --rounds 500 --seconds 0.01

One process serves the same application three times, in turn: without a page, with a page, and with
`on_report`. Each has a database object of its own for the same PostgreSQL database. The figures are
medians; the ratios are those of each round.
"""

import asyncio
import statistics
import sys
from argparse import ArgumentParser
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import postgres
from sqlalchemy import Column, Integer, MetaData, Table, select
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
    """The application with its middleware."""
    routes = [Route("/read", read), Route("/nothing", nothing)]
    return DBSessionMiddleware(Starlette(routes=routes), database, **options)


async def measure(rounds: int, seconds: float) -> dict[str, Rounds]:
    """Microseconds per request, of each application in turn."""
    url = postgres.new_database("live").set(drivername="postgresql+asyncpg")
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
        async with plain.engine.begin() as connection:
            await connection.run_sync(ENTRY.metadata.create_all)
        return {
            name: await in_turn(
                {each: asking(app, "GET", path) for each, app in apps.items()}, rounds, seconds
            )
            for name, path in PATHS.items()
        }


if __name__ == "__main__":
    parser = ArgumentParser(prog="python -m benchmarks.live")
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=0, help="of one turn; 0: one request")
    arguments = parser.parse_args()
    for name, found in asyncio.run(measure(arguments.rounds, arguments.seconds)).items():
        print(name)
        for each, times in found.items():
            ratios = [one / other for one, other in zip(times, found["without"], strict=True)]
            took, ratio = statistics.median(times), statistics.median(ratios)
            print(f"  {each:15} {took:7.1f} µs   {ratio:.3f} ×")
