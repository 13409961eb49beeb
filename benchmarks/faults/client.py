"""An HTTP client that can vanish at any point of its request."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from .cluster import HOST

_PATIENCE = 15.0  # seconds

NOBODY_LISTENED = 0


@dataclass(frozen=True)
class Request:
    """What a client asks for, and how it behaves.

    Attributes:
        path: With its query.
        method: How.
        cancel_after: Seconds after which the server is to cancel it.
        leave_after: Seconds after which the client vanishes, answer or not.
        leave: Whether it vanishes while "sending" its request, or while "reading" the answer.
    """

    path: str
    method: str = "POST"
    cancel_after: float | None = None
    leave_after: float | None = None
    leave: str = ""

    @property
    def is_given_up(self) -> bool:
        """Whether the client, or the server, does not wait until it is done."""
        return bool(self.leave or self.leave_after or self.cancel_after)


async def ask(port: int, request: Request) -> int | None:
    """The status of the answer; None where there was none, or the client did not wait for it.

    `NOBODY_LISTENED` where the request did not even leave.
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
    """How many connections are out of the pool of the worker there; None where none answers."""
    answer = await ask_door(port, "/status")
    return None if answer is None else int(answer["held"])


async def ask_door(port: int, path: str) -> Any:
    """What the `Door` of the worker there says; None where none answers."""
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
