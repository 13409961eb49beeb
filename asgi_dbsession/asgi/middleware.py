"""The middleware: commits, rolls back and closes the unit of work of a request."""

from collections.abc import Callable

from sqlalchemy import URL
from typing_extensions import Never

from asgi_dbsession.errors import ABORTED, AbortRequest
from asgi_dbsession.types import ASGIApp, Receive, Scope, Send
from asgi_dbsession.unit.ending import close
from asgi_dbsession.unit.report import UnitReport
from asgi_dbsession.unit.retry_on import RetryOn
from asgi_dbsession.unit.unit_of_work import UnitOfWork, current_unit

from .answer import add_note, answer_or_raise
from .arguments import AnyDatabase, application_first, no_application, usable_databases
from .commit_rule import CommitWhen, below_400, commit_rule
from .exchange import Exchange
from .lifespan import Startable, Unstartable, serve_lifespan
from .optional import with_optional_rooms, with_positions
from .read_rule import ReadOnly, apply_read_rule
from .websocket import SocketExchange

# The key of the unit of work in the ASGI scope. An inner DBSessionMiddleware finds the unit of the
# outer DBSessionMiddleware there, and joins it.
_KEY = "asgi_dbsession"


class DBSessionMiddleware:
    """Give each request one session per database, and commit before the response is sent.

    1. A session is opened when the application first asks for it.
    2. If the status is below 400, the start of the response waits for COMMIT.
    3. After any other status, an exception, a cancellation, or no response: ROLLBACK.
    4. If COMMIT fails, nothing of the response is sent, and background tasks do not run.
    5. Streaming bodies and background tasks use the same session in a new unit of work, which is
       committed at their end, and rolled back if they fail.
    6. When the application returns, its sessions are closed permanently.

    On a WebSocket, the work of a task is committed before the task sends a message or waits for a
    message. A denial, an exception or a close code other than 1000 and 1001 rolls back.

    Databases are started before the application's own startup and stopped after its shutdown. All
    other scopes and messages pass unchanged.

    Args:
        app: The ASGI application.
        *databases: Any number of `AsyncDatabase`, `SyncDatabase` or URL (for an `AsyncDatabase`);
            the first is the default. Without databases: `AsyncDatabase.from_env()`.
        commit_when: A plain function that replaces `status < 400` in rules 2 and 3. It takes the
            status, or the status and the ASGI scope of the request: `def rule(status, scope)`. It
            must return True or False. After any other value, the unit is rolled back and
            `ConfigurationError` is raised.
        on_commit_error: A plain function that takes the error of a failed COMMIT and returns the
            response: an ASGI application, such as a Starlette `Response`. If the function returns
            None, or if no function is given, the error is raised to the server.
        attempts: How often a request may run. If the database reports a conflict (serialization
            failure, deadlock, busy SQLite, or a statement outdated by a migration), or a read-only
            unit of work loses its connection, the request runs again from the start, with the same
            body, after at most a second. There is no retry after a message was sent, after a
            COMMIT on a database of this package, after a statement with AUTOCOMMIT, or after a
            cancellation. There is no retry of a request whose body exceeds 1 MiB, or that came
            while the bodies of other requests used 32 MiB of memory. If the handler changed
            anything outside of the database, each retry changes it again.
        retry_on: Errors to retry in the same way as a conflict: an exception class, a tuple of
            classes, or a plain function that takes an exception and returns True or False. The
            function gets errors of the database, exceptions that the application raises, and
            exceptions that the application answers with a status of 400 or above.
        retry_after: The seconds for the header `Retry-After`. If no connection becomes free within
            the engine's `pool_timeout`, and the request ends with the error of the pool or a status
            of 500, the response is 503 with this header. None: never answer 503.
        read_only: A plain function that takes the ASGI scope and returns True if the request may
            only read, such as `safe_methods`. The session and the database then refuse writes, and
            `ForbiddenWrite` is raised to the server. None: all requests may write.
        two_phase: True to commit the sessions of a request in two phases, so that no COMMIT can
            fail after another COMMIT has succeeded. The drivers must support it.
        on_report: A plain function to call at the end of each unit of work: before the status is
            sent, after the body or background task, and after each `begin()` and `on_commit`
            function. `on_report` runs on the event loop, or on the thread that called
            `SyncDatabase.begin()`, so it must be fast. Its exceptions are logged.

    Raises:
        ConfigurationError: An argument is wrong. If a URL is wrong, or if an event loop is running,
            where frameworks create their middleware, this error is not raised here, but makes the
            startup of the server fail. If the server sends no startup message, each request fails.
    """

    def __init__(
        self,
        app: ASGIApp = no_application,
        /,
        *databases: AnyDatabase | str | URL,
        commit_when: CommitWhen = below_400,
        on_commit_error: Callable[[Exception], ASGIApp | None] | None = None,
        attempts: int = 1,
        retry_on: RetryOn = None,
        retry_after: int | None = None,
        read_only: ReadOnly | None = None,
        two_phase: bool = False,
        on_report: Callable[[UnitReport], object] | None = None,
        **unknown: Never,
    ) -> None:
        app, databases = application_first(app, databases, unknown)
        self.app: ASGIApp = app
        self.databases: tuple[AnyDatabase, ...] = ()
        self.commit_when: CommitWhen = commit_when
        self.on_commit_error: Callable[[Exception], ASGIApp | None] | None = on_commit_error
        self.attempts: int = attempts
        self.retry_on: RetryOn = retry_on
        self.retry_after: int | None = retry_after
        self.two_phase: bool = two_phase
        self.read_only: ReadOnly | None = read_only
        self.on_report: Callable[[UnitReport], object] | None = on_report
        usable = usable_databases(app, databases, unknown, vars(self), type(self))
        if isinstance(usable, Unstartable):
            self._startable: tuple[Startable, ...] = (usable,)
            self._serve: ASGIApp = usable.refuse
            self._serve_http: ASGIApp = usable.refuse
            return
        self._startable = self.databases = usable
        self._commit_rule = commit_rule(commit_when)
        self._serve = with_positions(self._serve_one, usable)
        self._serve_http, self._observers = with_optional_rooms(
            self._serve,
            usable,
            attempts=attempts,
            retry_on=retry_on,
            retry_after=retry_after,
            on_commit_error=on_commit_error,
            on_report=on_report,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, WebSocket or lifespan of the server."""
        kind = scope["type"]
        if kind == "http":
            # If an outer DBSessionMiddleware serves this request too, only the outer middleware
            # retries the request and answers 503.
            serve = self._serve_http if scope.get(_KEY) is None else self._serve
            try:
                await serve(scope, receive, send)
            except AbortRequest as abort:
                failure = abort.failure
            else:
                return
            await answer_or_raise(failure, self.on_commit_error, scope, receive, send)
        elif kind == "websocket":
            await self._serve(scope, receive, send)
        elif kind == "lifespan":
            await serve_lifespan(self.app, self._startable, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _serve_one(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Open a unit of work, call the application, and close the unit of work."""
        outer: UnitOfWork | None = scope.get(_KEY)
        unit = scope[_KEY] = UnitOfWork(self.databases, scope, outer, self._observers)
        unit.joins_outer_unit, unit.two_phase = outer is not None, self.two_phase
        exchange: Exchange | SocketExchange
        if scope["type"] == "http":
            exchange = Exchange(unit, receive, send, self._commit_rule)
        else:
            exchange = SocketExchange(unit, receive, send)
        token = current_unit.set(unit)
        try:
            if self.read_only is not None:
                apply_read_rule(self.read_only, unit, scope)
            await self.app(scope, exchange.receive, exchange.send)
        except BaseException as error:
            await close(unit, commit=False, error=error)
            if unit.failure is None or not isinstance(error, ABORTED):
                raise
            add_note(unit.failure, error)
        else:
            # The application may return without success: if the client disconnects, a streaming
            # body just ends. So commit only if the response is complete.
            unit.closed = True
            if unit.is_used:
                commit = exchange.may_commit and not unit.rollback and unit.failure is None
                await close(unit, commit=commit, sort_tasks=True)
        finally:
            current_unit.reset(token)
            scope[_KEY] = outer
            # Remove the scope: a task that is still running after the request must not use it.
            unit.scope = None
            failure = unit.failure
            if failure is not None:
                # Replace the error, because it keeps the data of the request in memory. A task that
                # is still running must only see that there was an error.
                unit.failure = RuntimeError()
        if failure is not None:
            if unit.is_answered:
                raise failure
            raise AbortRequest(failure) from failure
