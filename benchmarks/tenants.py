"""Checks if the tenants of `docs/how-to/multi-tenancy.md` ever see each other's rows.

    python benchmarks/tenants.py --requests 100000

The very code of the page, in process, on the PostgreSQL that the test dependencies bring along:
requests of 50 tenants, 20 at a time, over 5 connections, directly and through PgBouncer. Each
changes all rows that it can see, without a WHERE, before and after a commit in its middle; some
then answer with an error, some raise, some look from outside, and some are cancelled wherever they
are. A row of another tenant in sight, or a count that the answers do not add up to, is a failure.
"""

import argparse
import asyncio
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tenants import WAYS, Shop


def main(requests: int, ways: list[str]) -> None:
    """Print how many requests were sent in each way of the page."""
    for way in ways:
        for bouncer in (False, True):
            shop = Shop(way, bouncer=bouncer)
            start = time.perf_counter()
            asyncio.run(shop.stress(requests))
            outcomes = ", ".join(f"{shop.outcomes[each]} {each}" for each in sorted(shop.outcomes))
            print(
                f"{way}, {'through PgBouncer' if bouncer else 'directly'}: {requests} requests in "
                f"{time.perf_counter() - start:.0f} s ({outcomes}), each in its place",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2_000, help="for each way")
    parser.add_argument("--way", choices=WAYS, action="append", help="all of them, if not given")
    arguments = parser.parse_args()
    main(arguments.requests, arguments.way or list(WAYS))
