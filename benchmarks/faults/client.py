"""An HTTP client that can disconnect at any point of its request."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from .cluster import HOST

_PATIENCE = 15.0  # seconds

NOBODY_LISTENED = 0


@dataclass(frozen=True)
class Request:
    """The request of a client, and how the client behaves.

    Attributes:
        path: The path with its query.
        method: The HTTP method.
        cancel_after: Seconds after which the server must cancel the request.
        leave_after: Seconds after which the client disconnects, with or without an answer.
        leave: "sending" or "reading" if the client disconnects while it sends the request or reads
            the answer.
    """

    path: str
    method: str = "POST"
    cancel_after: float | None = None
    leave_after: float | None = None
    leave: str = ""

    @property
    def is_given_up(self) -> bool:
        """True if the client or the server does not wait for the end of the request."""
        return bool(self.leave or self.leave_after or self.cancel_after)


async def ask(port: int, request: Request) -> int | None:
    """Send the request, and return the status; None without an answer.

    The result is `NOBODY_LISTENED` if the request could not be sent.
    """
    status: int | None = None
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
    except (ConnectionRefusedError, ConnectionResetError):
        return NOBODY_LISTENED
    data = _encode(request)
    try:
        async with asyncio.timeout(request.leave_after or _PATIENCE):
            if request.leave == "sending":
                writer.write(data[: len(data) // 2])
                await writer.drain()
                return None
            writer.write(data)
            line = await reader.readline()
            if line.endswith(b"\n"):
                status = int(line.split()[1])
            if request.leave != "reading":
                await reader.read()
    except (OSError, TimeoutError):
        return status
    finally:
        writer.transport.abort()
    return status


async def held(port: int) -> int | None:
    """Return how many connections of the worker are checked out; None without an answer."""
    answer = await ask_door(port, "/status")
    return None if answer is None else int(answer["held"])


async def ask_door(port: int, path: str) -> Any:
    """Return the report of the worker's `Door`; None without an answer."""
    try:
        async with asyncio.timeout(_PATIENCE):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                writer.write(_encode(Request(path, "GET")))
                body = (await reader.read()).partition(b"\r\n\r\n")[2]
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError):
        return None
    return json.loads(body or b"null")


def _encode(request: Request) -> bytes:
    lines = [f"{request.method} {request.path} HTTP/1.1", f"host: {HOST}", "connection: close"]
    if request.method == "POST":
        lines.append("content-length: 0")
    if request.cancel_after is not None:
        lines.append(f"x-cancel-after: {request.cancel_after:.4f}")
    return "\r\n".join((*lines, "", "")).encode()
