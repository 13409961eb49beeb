"""Measures imports, start and shutdown once, and the growth over many requests."""

import asyncio
from typing import Any

from .clients import ask_in_turn
from .each_request import printed_by
from .servers import Server
from .size import Size
from .turns import spread

_CLIENTS = 5
_SAMPLES = 10
_MIXTURE = (
    ("GET", "/nothing"),
    *[("GET", "/read")] * 5,
    *[("POST", "/insert")] * 2,
    ("POST", "/entries/1?then=refuse"),  # rolled back
    ("GET", "/stream"),
)
_PACKAGES = (
    "asgi_dbsession",
    "fastapi_async_sqlalchemy",
    "context_async_sqlalchemy",
    "fastapi_sqla",
    "advanced_alchemy.extensions.fastapi",
)
_BEFORE = {"beyond SQLAlchemy": "", "beyond SQLAlchemy and FastAPI": ", fastapi"}
_IMPORT = """
import time, sqlalchemy.ext.asyncio, sqlalchemy.orm{before}
start = time.perf_counter()
import {package}
print((time.perf_counter() - start) * 1e3)
"""


async def long_run(server: Server, size: Size) -> list[dict[str, float]]:
    """Return the memory of the server after each tenth of the requests, after some to warm up."""
    found = []
    part = size.requests // _SAMPLES
    for number in range(_SAMPLES + 1):
        count = part if number else max(part // 10, 100)
        requests = list(_MIXTURE) * (count // len(_MIXTURE))
        await ask_in_turn(server.port, requests, _CLIENTS)
        await asyncio.sleep(0.2)  # the server notices that the clients have disconnected
        measured = await asyncio.to_thread(server.measured)
        del measured["held"], measured["pid"]
        found.append({"requests": number * part, **measured})
    return found


async def starts(tools: list[str], size: Size, url: str) -> dict[str, Any]:
    """Return the milliseconds of startup and shutdown, each time in a new process."""
    taken: dict[str, dict[str, list[float]]] = {tool: {} for tool in tools}
    for _ in range(size.starts):
        for tool in tools:
            once = await printed_by(url, 5, "-m", "benchmarks.speed.startup", tool)
            for name, milliseconds in once.items():
                taken[tool].setdefault(name, []).append(milliseconds)
    return {
        tool: {name: spread(values) for name, values in each.items()}
        for tool, each in taken.items()
    }


async def imports(tools: list[str], size: Size) -> dict[str, Any]:
    """Return the milliseconds of importing a package, each time in a new process."""
    packages = [each for each in _PACKAGES if each.partition(".")[0] in tools]
    taken: dict[str, dict[str, list[float]]] = {each: {} for each in packages}
    for _ in range(size.starts):
        for package in packages:
            for name, before in _BEFORE.items():
                code = _IMPORT.format(before=before, package=package)
                taken[package].setdefault(name, []).append(await printed_by("", 1, "-c", code))
    return {
        package.partition(".")[0]: {name: spread(values) for name, values in each.items()}
        for package, each in taken.items()
    }
