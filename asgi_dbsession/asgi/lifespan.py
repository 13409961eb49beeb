"""Starts and stops the databases with the application, even if the application has no lifespan."""

import logging
from collections.abc import Sequence
from typing import NoReturn, Protocol

from asgi_dbsession.errors import DBSessionError
from asgi_dbsession.session.completion import run_to_completion
from asgi_dbsession.types import ASGIApp, Message, Receive, Scope, Send

_logger = logging.getLogger("asgi_dbsession")


class Startable(Protocol):
    """An object, such as a database, to start and stop together with the application."""

    async def startup(self) -> None:
        """Start the object; if an error is raised, leave no connection open."""
        ...

    async def shutdown(self) -> None:
        """Stop the object, and close all connections that it opened since `startup`."""
        ...


class Unstartable:
    """Takes the place of databases that cannot be used: the startup fails with the reason.

    Frameworks create their middleware during the lifespan. If the creation raised an exception,
    servers would assume that the application has no lifespan, would start, and would answer each
    request with 500.
    """

    def __init__(self, reason: Exception) -> None:
        self._reason = reason

    async def startup(self) -> None:
        """Raise the reason why the databases cannot be used."""
        await self.refuse()

    async def shutdown(self) -> None:
        """Do nothing, because `startup` has started nothing."""

    async def refuse(self, *_: object) -> NoReturn:
        """Raise the reason why the databases cannot be used, for any ASGI scope."""
        raise self._reason.with_traceback(None)


async def serve_lifespan(
    app: ASGIApp, databases: Sequence[Startable], scope: Scope, receive: Receive, send: Send
) -> None:
    """Start the databases before the startup of `app`, and stop them after its shutdown.

    The databases are stopped before the server gets the result of the shutdown, even after an
    error. If the application raises before it receives the startup message, it has no lifespan: its
    requests are served without a lifespan. If the application raises after it has received the
    startup message, the startup has failed, and the server gets `startup.failed`.
    """
    lifespan = _Lifespan(databases, receive, send)
    try:
        await lifespan.start()
        await lifespan.serve(app, scope)
    finally:
        await lifespan.stop()


class _Lifespan:
    """One run of the lifespan; starts and stops the databases at startup and shutdown."""

    def __init__(self, databases: Sequence[Startable], receive: Receive, send: Send) -> None:
        self._databases = databases
        self._receive = receive
        self._send = send
        self._running: list[Startable] = []
        self._startup: Message | None = None
        self._answered_startup = False
        self._heard_shutdown = False
        self._finished = False

    async def start(self) -> None:
        self._startup = await self._receive()
        failure = await self._start_each()
        if failure is None:
            return
        # Send `startup.failed` outside of an `except` block. Otherwise, if `send` raises (as in
        # hypercorn), the traceback of its exception would show the failure of the database too.
        await self.stop()
        await self._send({"type": "lifespan.startup.failed", "message": _one_line(failure)})
        # Raise the failure for test clients. Without an exception, a test client would run the test
        # although the startup failed, and then wait forever for the end of the shutdown.
        raise failure

    async def _start_each(self) -> Exception | None:
        try:
            for database in self._databases:
                await database.startup()
                self._running.append(database)
        except Exception as error:
            return error
        return None

    async def serve(self, app: ASGIApp, scope: Scope) -> None:
        failure: Exception | None = None
        try:
            await app(scope, self.receive, self.send)
        except Exception as error:
            failure = error
        if failure is not None and not self._answered_startup:
            if self._startup is None:
                await self._fail_startup(failure)
            _logger.info("The application has no lifespan, and is served without one: %r", failure)
            failure = None
        await self._serve_after_return()
        if failure is not None:
            raise failure
        if not self._finished:
            await self.send({"type": "lifespan.shutdown.complete"})

    async def _fail_startup(self, failure: Exception) -> NoReturn:
        # Log the traceback, because servers show only the message of `startup.failed`.
        _logger.error("The startup of the application failed", exc_info=failure)
        await self.send({"type": "lifespan.startup.failed", "message": _one_line(failure)})
        raise failure

    async def _serve_after_return(self) -> None:
        """Answer the lifespan messages of the ASGI server after the application has returned."""
        if not self._answered_startup:
            await self.send({"type": "lifespan.startup.complete"})
        while not (self._finished or self._heard_shutdown):
            await self.receive()

    async def receive(self) -> Message:
        if self._startup is not None:
            startup, self._startup = self._startup, None
            return startup
        message = await self._receive()
        self._heard_shutdown = message["type"] == "lifespan.shutdown"
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "lifespan.startup.complete":
            self._answered_startup = True
        elif kind == "lifespan.startup.failed":
            self._answered_startup = self._finished = True
            await self.stop()
        elif kind in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
            self._finished = True
            failures = await self.stop()
            if failures and kind == "lifespan.shutdown.complete":
                message = {"type": "lifespan.shutdown.failed", "message": _one_line(failures[0])}
        await self._send(message)

    async def stop(self) -> list[Exception]:
        """Stop all running databases, even after a cancellation or if a database fails to stop."""
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
