"""Builds engines when the server starts, and closes their connections when the server stops.

The server announces both in its startup and shutdown messages (ASGI lifespan). If the application
does not support these messages, this module answers them.
"""

import logging
from collections.abc import Iterable
from typing import Any, NoReturn

from asgi_dbsession.errors import ConfigurationError, DBSessionError
from asgi_dbsession.session.completion import run_to_completion
from asgi_dbsession.types import ASGIApp, Message, Receive, Scope, Send

_logger = logging.getLogger("asgi_dbsession")
# Each of these messages is the last one of a lifespan. The databases are stopped before it.
_LAST = ("lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed")

_NO_LIFESPAN = (
    "The application sent {!r} in the lifespan of the server. Begin the application with "
    '`assert scope["type"] == "http"`: the middleware answers the lifespan then.'
)


class Unstartable:
    """Keeps the error of a wrong middleware argument, to raise it when the server starts.

    `DBSessionMiddleware` stores this object instead of its databases. Do not raise the error at
    once: many frameworks create their middleware when the server sends the startup message. After
    an exception, servers would believe that the application does not support startup messages. They
    would start, and answer each request with 500.
    """

    def __init__(self, reason: Exception) -> None:
        self._reason = reason

    async def refuse(self, *_: object) -> NoReturn:
        """Raise the error that tells why the databases cannot be used.

        The middleware calls this method at startup, and for each request instead of the
        application. So the method takes any arguments.
        """
        raise self._reason.with_traceback(None)

    startup = refuse


async def serve_lifespan(
    app: ASGIApp, databases: Iterable[Any], scope: Scope, receive: Receive, send: Send
) -> None:
    """Start the databases before the application starts, and stop them after it has stopped.

    The databases are stopped before the server gets the answer to its shutdown message, even after
    an error. Three kinds of applications do not answer the startup message of the server:

    - One raises an exception before it receives the message, because it does not support lifespan
      messages. This function answers them instead, and the server starts.
    - One receives the message and then raises an exception. The server gets
      `lifespan.startup.failed`, and does not start.
    - One ignores `scope["type"]`, and sends an HTTP response, for example. This call of `send`
      raises `ConfigurationError` in the application.

    Args:
        app: The application.
        databases: The databases. If an argument of `DBSessionMiddleware` was wrong, a single
            `Unstartable` object, whose method `startup` raises the error.
        scope: The ASGI scope of the lifespan.
        receive: The ASGI function that returns the next message of the server.
        send: The ASGI function that sends a message to the server.
    """
    lifespan = _Lifespan(databases, receive, send)
    try:
        await lifespan.serve(app, scope)
    finally:
        await lifespan.stop()


class _Lifespan:
    """Passes the startup and shutdown messages on, and starts and stops the databases with them."""

    def __init__(self, databases: Iterable[Any], receive: Receive, send: Send) -> None:
        self._databases = databases
        self._receive = receive
        self._send = send
        self._running: list[Any] = []
        # The startup message of the server. None if the application has received it already, or if
        # a database has not started.
        self._startup: Message | None = None
        self._heard_shutdown = False
        # The type of the last ASGI message to the server, such as `lifespan.startup.complete`.
        self._sent: str | None = None

    async def serve(self, app: ASGIApp, scope: Scope) -> None:
        startup = await self._receive()
        has_databases = False
        failure: Exception | None = None
        try:
            for database in self._databases:
                await database.startup()
                self._running.append(database)
            has_databases, self._startup = True, startup
            await app(scope, self.receive, self.send)
        except Exception as error:
            failure = error
        # Send messages outside of an `except` block. If `send` raises too (as with hypercorn), the
        # traceback of that exception would otherwise show `failure` a second time.
        if failure is not None and self._sent is None:
            if self._startup is None:
                if has_databases:
                    # Log the traceback here. Servers show only the text of the ASGI message
                    # `lifespan.startup.failed`.
                    _logger.error("The startup of the application failed", exc_info=failure)
                await self.send({"type": "lifespan.startup.failed", "message": _one_line(failure)})
                # Raise the error for test clients. A test client that gets no exception would run
                # the test although the startup failed, and would then wait forever for the end of
                # the shutdown.
                raise failure
            _logger.info("The application has no lifespan, and is served without one: %r", failure)
            failure = None
        # The application has returned. If it has not answered the startup message or the shutdown
        # message, answer them here.
        if self._sent is None:
            await self.send({"type": "lifespan.startup.complete"})
        while self._sent not in _LAST and not self._heard_shutdown:
            await self.receive()
        if failure is not None:
            raise failure
        if self._sent not in _LAST:
            await self.send({"type": "lifespan.shutdown.complete"})

    async def receive(self) -> Message:
        if self._startup is not None:
            startup, self._startup = self._startup, None
            return startup
        message = await self._receive()
        self._heard_shutdown = message["type"] == "lifespan.shutdown"
        return message

    async def send(self, message: Message) -> None:
        # An application that ignores `scope["type"]` may answer the startup message with an HTTP
        # response. Without this error, the server would wait for the startup answer forever.
        if not message["type"].startswith("lifespan."):
            raise ConfigurationError(_NO_LIFESPAN.format(message["type"]))
        self._sent = message["type"]
        if self._sent in _LAST:
            failures = await self.stop()
            if failures and self._sent == "lifespan.shutdown.complete":
                message = {"type": "lifespan.shutdown.failed", "message": _one_line(failures[0])}
        await self._send(message)

    async def stop(self) -> list[Exception]:
        """Stop all running databases, even after a cancellation or if one of them fails to stop."""
        return await run_to_completion(self._stop_each()) if self._running else []

    async def _stop_each(self) -> list[Exception]:
        failures: list[Exception] = []
        while self._running:
            database = self._running.pop()
            try:
                await database.shutdown()
            except Exception as error:
                _logger.exception("%s could not be shut down", database)
                failures.append(error)
        return failures


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, DBSessionError) else f"{type(error).__name__}: {text}"
