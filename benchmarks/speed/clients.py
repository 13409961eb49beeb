"""Simulates many clients at once, which read fast or slowly, or listen to events."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

from benchmarks.faults.cluster import HOST

DOWNLOAD = 400_000  # bytes, of `/download`
SLOW = 100_000  # bytes per second
_SIP = 25_000  # bytes, at once


async def read_fast(port: int, path: str, clients: int, coming: float, seconds: float) -> float:
    """Return the responses per second for so many clients, each with one request after the other.

    Not counted while they come.
    """
    return len(await ask_on(port, ("GET", path), clients, coming, seconds)) / seconds


async def ask_on(
    port: int, request: tuple[str, str], clients: int, coming: float, seconds: float
) -> list[float]:
    """The seconds that each response took to so many clients, who ask on and on.

    Only of those that were answered after so many seconds of `coming`.
    """
    start = time.monotonic() + coming
    end = start + seconds
    taken: list[float] = []
    method, path = request

    async def be_client() -> None:
        async with _connected(port) as (reader, writer):
            while (asked := time.monotonic()) < end:
                await _ask(reader, writer, path, method)
                if start <= (answered := time.monotonic()) < end:
                    taken.append(answered - asked)

    # Clients without an answer by then are not waited for.
    async with _at_work(be_client() for _ in range(clients)) as tasks:
        await asyncio.wait(tasks, timeout=coming + seconds + 0.1)
    return taken


async def read_slowly(port: int, clients: int, coming: int, seconds: int) -> list[float]:
    """Return the downloads per second of so many clients that read 100 kB per second each.

    Counted by the byte, in each second but those in which they come and buffers fill.
    """
    received = 0

    async def be_client() -> None:
        nonlocal received
        while True:
            async for size in _sips(port):
                received += size

    rates = []
    async with _at_work(be_client() for _ in range(clients)):
        for _ in range(coming + seconds):
            before, start = received, time.monotonic()
            await asyncio.sleep(1)
            rates.append((received - before) / DOWNLOAD / (time.monotonic() - start))
    return rates[coming:]


async def download_slowly(port: int, seconds: float) -> None:
    """Download once at 100 kB per second, or disconnect after so many seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            async for _ in _sips(port):
                pass


@asynccontextmanager
async def listening(port: int, listeners: int, seconds: float) -> AsyncIterator[int]:
    """Let so many clients listen to `/events`, and return how many got an event in time."""
    heard = 0

    async def be_listener() -> None:
        nonlocal heard
        async with _connected(port) as (reader, writer):
            writer.write(_request("/events"))
            await reader.readuntil(b"data: ")
            heard += 1
            await reader.read()

    async with _at_work(be_listener() for _ in range(listeners)):
        end = time.monotonic() + seconds
        while heard < listeners and time.monotonic() < end:
            await asyncio.sleep(0.02)
        yield heard


async def time_one(port: int, path: str, patience: float) -> float | None:
    """Return the milliseconds of one more request; None if it takes too long."""
    start = time.monotonic()
    try:
        async with asyncio.timeout(patience), _connected(port) as (reader, writer):
            await _ask(reader, writer, path)
    except TimeoutError:
        return None
    return (time.monotonic() - start) * 1e3


async def ask_in_turn(port: int, requests: list[tuple[str, str]], clients: int) -> None:
    """Send all these requests (method and path) with so many clients at once."""
    left = iter(requests)

    async def be_client() -> None:
        async with _connected(port) as (reader, writer):
            for method, path in left:
                await _ask(reader, writer, path, method)

    await asyncio.gather(*(be_client() for _ in range(clients)))


@asynccontextmanager
async def _at_work(
    clients: Iterable[Coroutine[Any, Any, None]],
) -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(client) for client in clients]
    try:
        yield tasks
        for task in tasks:
            if task.done() and (error := task.exception()) is not None:
                raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _connected(
    port: int, room: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    connection = socket.socket()
    connection.setblocking(False)
    if room is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    await asyncio.get_running_loop().sock_connect(connection, (HOST, port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=room or 2**16)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def _request(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: 0\r\n\r\n".encode()


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, method: str = "GET"
) -> None:
    writer.write(_request(path, method))
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b"content-length:" in head:
        await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
    else:
        await reader.readuntil(b"0\r\n\r\n")
    if int(head.split()[1]) >= 500:
        raise RuntimeError(f"{path} was answered {head.decode()}")


async def _sips(port: int) -> AsyncIterator[int]:
    async with _connected(port, room=8192) as (reader, writer):
        writer.write(_request("/download"))
        due, left = time.monotonic(), DOWNLOAD
        while left > 0 and (sip := await reader.read(_SIP)):
            left -= len(sip)
            yield len(sip)
            due = max(due, time.monotonic()) + len(sip) / SLOW  # who was late does not hurry
            await asyncio.sleep(due - time.monotonic())
