"""A TCP proxy on the loopback interface that cuts connections in the middle of COMMIT."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from .cluster import HOST

BEFORE, AFTER = "before", "after"


class Proxy:
    """A proxy between an application and its database.

    Args:
        port: The port of the database.

    Attributes:
        cut: A function that decides for each COMMIT if its connection is cut `BEFORE` the server
            gets it, `AFTER` the server has answered but before the client gets the answer, or never
            (None).
        cuts: How often a connection was cut.
    """

    def __init__(self, port: int) -> None:
        self._database = port
        self._server: asyncio.Server | None = None
        self.cut: Callable[[], str | None] = _never
        self.cuts = 0

    async def start(self) -> int:
        """Start to listen, and return the port."""
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_database, to_database = await asyncio.open_connection(HOST, self._database)
        except OSError:
            writer.transport.abort()
            return
        answer_is_lost = asyncio.Event()

        async def forward_requests() -> None:
            while chunk := await reader.read(65536):
                cut = self.cut() if b"COMMIT" in chunk else None
                if cut is not None:
                    self.cuts += 1
                if cut == BEFORE:
                    return
                if cut == AFTER:
                    answer_is_lost.set()
                to_database.write(chunk)

        async def forward_answers() -> None:
            while chunk := await from_database.read(65536):
                if answer_is_lost.is_set():
                    return
                writer.write(chunk)

        ways = [asyncio.create_task(way()) for way in (forward_requests, forward_answers)]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            writer.transport.abort()
            to_database.transport.abort()
            with suppress(OSError, asyncio.CancelledError):
                await asyncio.gather(*ways)


def _never() -> str | None:
    return None
