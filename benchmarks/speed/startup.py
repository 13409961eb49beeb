"""Measures startup, the first request and shutdown.

DATABASE_URL=... python -m benchmarks.speed.startup TOOL
"""

import asyncio
import json
import sys
import time
from importlib import import_module

from .in_process import alive, asking


async def measure(tool: str) -> dict[str, float]:
    """Return the milliseconds of each."""
    app = import_module(f"benchmarks.peers.{tool}").app
    begun = time.perf_counter()
    async with alive(app):
        started = time.perf_counter()
        await asking(app, "GET", "/read")()
        asked = time.perf_counter()
    ended = time.perf_counter()
    return {
        "startup": (started - begun) * 1e3,
        "startup and the first SELECT": (asked - begun) * 1e3,
        "shutdown": (ended - asked) * 1e3,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(sys.argv[1]))))
