"""The class `DBSessionMiddleware`, which opens and closes the unit of work of each request."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import URL
from typing_extensions import Never

from asgi_dbsession.errors import ABORTED
from asgi_dbsession.types import ASGIApp, Receive, RetryOn, Scope, Send
from asgi_dbsession.unit.current import current_unit
from asgi_dbsession.unit.ending import close
from asgi_dbsession.unit.report import UnitReport
from asgi_dbsession.unit.unit_of_work import UnitOfWork

from .answer import OnCommitError, add_note, answer_or_raise
from .arguments import AnyDatabase, application_first, no_application, usable_databases
from .composition import with_optional_rooms, with_positions
from .exchange import Exchange
from .lifespan import Unstartable, serve_lifespan
from .rules import CommitWhen, ReadOnly, apply_read_rule, below_400, commit_rule

# The key of the ASGI scope under which the unit of work (the sessions of the request) is stored. An
# inner DBSessionMiddleware finds the outer unit of work there, and uses the same sessions.
_KEY = "asgi_dbsession"


class DBSessionMiddleware:
    """Give each request one session per database, and commit before the response is sent.

    1. A session is opened when the application asks for the session for the first time.
    2. If the status of the response is below 400, COMMIT is sent before the response starts.
    3. After any other status, an exception, a cancellation, or without a response: ROLLBACK.
    4. If COMMIT fails, nothing of the response is sent, and background tasks do not run.
    5. A streaming body, and then a background task, use the same session again. The work of each is
       a new unit of work: committed at its end, and rolled back if it raises an exception.
    6. When the application returns, its sessions are closed permanently.

    For a WebSocket, the work of a task is committed before the task sends a message or waits for a
    message. Work is rolled back if the handshake is denied, after an exception, and before a close
    with another code than 1000 and 1001.

    Databases are started before the application, and stopped after it. Scopes and messages of other
    types are passed on unchanged.

    Args:
        app: The ASGI application to wrap.
        *databases: The databases: each an `AsyncDatabase`, a `SyncDatabase`, or a URL from which an
            `AsyncDatabase` is made. The first database is the default. If there are none,
            `AsyncDatabase.from_env()` is used.
        commit_when: A plain function that replaces the condition `status < 400` in rules 2 and 3.
            It takes the status, or the status and the ASGI scope of the request: `def rule(status,
            scope)`. It must return True to commit or False to roll back. After any other value, the
            work is rolled back and `ConfigurationError` is raised. It does not decide about
            streaming bodies, background tasks and WebSockets.
        on_commit_error: A plain function that takes the error of a failed COMMIT and returns the
            response: an ASGI application, such as a Starlette `Response`. If the function returns
            None, or if there is no function, the server gets the error as an exception.
        attempts: How often a request may run; 1 means no retry. A request is retried if the
            database reports a conflict (serialization failure, deadlock, busy SQLite, or a
            statement outdated by a migration), or if a read-only unit of work loses its connection.
            Each retry gets the same body, and starts after at most one second. There is no retry
            after a message was sent, after a COMMIT on an `AsyncDatabase` or `SyncDatabase`, after
            a statement with AUTOCOMMIT, or after a cancellation. There is no retry of a request
            whose body is larger than 1 MiB, or that came while the bodies of other requests used 32
            MiB of memory. If the handler changed anything outside of the database, each retry
            changes it again.
        retry_on: Further errors to retry in the same way as a conflict: an exception class, a tuple
            of classes, or a plain function that takes an exception and returns True or False. These
            errors may come from the database. They may also be raised by the application, even if
            it answers them with a status of 400 or above.
        retry_after: The number of seconds for the header `Retry-After` of a 503 response. A request
            gets this response if no connection of a pool became free within the engine's
            `pool_timeout`, and the request then fails: with the error of the pool, or with a status
            of 500. None: never send 503.
        read_only: A plain function, such as `safe_methods`, that takes the ASGI scope and returns
            True if the request may only read. The session and the database then refuse writes, and
            the server gets `ForbiddenWrite` as an exception. None: all requests may write.
        two_phase: True to use two-phase commit for the sessions of a request: all databases store
            the work, or none does. If a connection is lost before its COMMIT, an operator must end
            the prepared transaction. The drivers must support two-phase commit.
        on_report: A plain function that is called with a report at the end of each unit of work:
            before the status is sent, after the body or background task, and after each `begin()`
            block and `on_commit` function. It runs on the event loop, or on the thread that called
            `SyncDatabase.begin()`, so it must be fast. If it raises an exception, the exception is
            logged.

    Raises:
        ConfigurationError: An argument is wrong. In three cases, this error is not raised here, but
            the startup of the server fails with it: (1) An event loop is running. (Many frameworks
            create their middleware during the startup.) (2) Only a URL is wrong. (3) A database
            does not support `two_phase=True`, as SQLite does not. If the server sends no startup
            message, each request fails with this error.
    """

    def __init__(
        self,
        app: ASGIApp = no_application,
        /,
        *databases: AnyDatabase | str | URL,
        commit_when: CommitWhen = below_400,
        on_commit_error: OnCommitError = None,
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
        self.on_commit_error: OnCommitError = on_commit_error
        self.attempts: int = attempts
        self.retry_on: RetryOn = retry_on
        self.retry_after: int | None = retry_after
        self.two_phase: bool = two_phase
        self.read_only: ReadOnly | None = read_only
        self.on_report: Callable[[UnitReport], object] | None = on_report
        usable = usable_databases(databases, unknown, vars(self))
        if isinstance(usable, Unstartable):
            self._startable: tuple[Any, ...] = (usable,)
            self._serve: ASGIApp = usable.refuse
            self._serve_http: ASGIApp = usable.refuse
            return
        self._startable = self.databases = usable
        self._commit_rule = commit_rule(commit_when)
        # WebSockets use `_serve`. HTTP requests use `_serve_http`, because only they can be retried
        # or get a 503 response.
        self._serve = with_positions(self._serve_one, usable)
        self._serve_http, self._observers = with_optional_rooms(self._serve_one, vars(self))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an HTTP request, a WebSocket, or the startup and shutdown of the server."""
        kind = scope["type"]
        if kind == "http":
            # If an outer DBSessionMiddleware serves this request too, it retries the request and
            # sends 503 responses. So do not use the code for this (`_serve_http`) a second time.
            serve = self._serve_http if scope.get(_KEY) is None else self._serve
            await serve(scope, receive, send)
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
        unit.joins_outer_unit = outer is not None
        if self.two_phase:
            from asgi_dbsession.unit.optional.two_phases.commit import TwoPhases

            unit.two_phases = TwoPhases(len(self.databases))
        if scope["type"] == "http":
            exchange: Any = Exchange(unit, receive, send, self._commit_rule)
        else:
            from .optional.websocket import SocketExchange

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
            # The application may return although the response is not complete: if the client
            # disconnects, a streaming body just stops. So commit only if the response is complete.
            unit.closed = True
            if unit.is_used:
                commit = exchange.may_commit and not unit.rollback and unit.failure is None
                await close(unit, commit=commit, sort_tasks=True)
        finally:
            current_unit.reset(token)
            scope[_KEY] = outer
            # A task may still run after the request. Remove the ASGI scope, so that the task cannot
            # use it.
            unit.scope = None
            failure = unit.failure
            if failure is not None:
                # A task may keep `unit` in memory after the request. So replace the exception by
                # one without a traceback, which would keep all local variables of the request.
                unit.failure = RuntimeError()
        if failure is not None:
            if unit.is_answered:
                raise failure
            await answer_or_raise(failure, self.on_commit_error, scope, receive, send)
