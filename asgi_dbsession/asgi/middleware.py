"""What happens to the unit of work of a request, on each ASGI message."""

from collections.abc import Callable

from sqlalchemy import URL
from typing_extensions import Never

from asgi_dbsession.errors import ABORTED, AbortRequest
from asgi_dbsession.types import ASGIApp, Receive, Scope, Send
from asgi_dbsession.unit.ending import close, close_returned
from asgi_dbsession.unit.report import UnitReport
from asgi_dbsession.unit.retry_on import RetryOn
from asgi_dbsession.unit.unit_of_work import UnitOfWork, current_unit

from .answer import add_note, answer_or_raise
from .arguments import AnyDatabase, application_first, no_application, usable_databases
from .commit_rule import CommitWhen, below_400, commit_rule
from .exchange import Exchange
from .lifespan import Startable, Unstartable, serve_lifespan
from .optional import with_optional_rooms
from .websocket import SocketExchange

# Where the unit of work of a request is in its scope: a middleware further in joins it.
_KEY = "asgi_dbsession"


class DBSessionMiddleware:
    """Give each request one session per database, and end it before the response is sent.

    1. A session is opened when the application first asks for it; none otherwise.
    2. The start of a response with a status below 400 waits for COMMIT, and is sent only then.
    3. On any other status, an exception, a cancellation, or no response: ROLLBACK.
    4. If COMMIT fails, nothing of the response is sent, and background tasks do not run.
    5. Streaming bodies and background tasks go on with the same session, as a unit of work of
       their own: committed when they end, rolled back when they fail.
    6. When the application returns, its sessions are closed permanently.

    On a WebSocket, the work of a task is committed before it sends or waits to receive. A denial,
    an exception or a close code other than 1000 and 1001 rolls back.

    Databases are started before the application's own startup and stopped after its shutdown.
    Other scopes and messages pass untouched.

    Args:
        app: The ASGI application.
        *databases: An `AsyncDatabase`, a `SyncDatabase`, or a URL (for an `AsyncDatabase`) each;
            the first is the default. None at all: `AsyncDatabase.from_env()`.
        commit_when: A plain function that replaces `status < 400` in rules 2 and 3. It takes the
            status, or the status and the ASGI scope of the request: `def rule(status, scope)`. It
            must return True or False; anything else is an error, and rolls back.
        on_commit_error: A plain function that makes the response to a COMMIT that failed: an ASGI
            application, such as a Starlette `Response`. If it returns None, and if there is none,
            the original exception is raised to the server.
        attempts: How often a request may run if the database reports a conflict: a serialization
            failure, a deadlock, a busy SQLite; or a statement that a migration has made stale. It
            runs again from the start, with the same body, after a random pause of at most a second.
            It never runs again once anything was sent, or committed on a database of this package,
            or under AUTOCOMMIT, or with a body of more than 1 MiB, or when cancelled. What its
            handler does elsewhere is done again.
        retry_on: What else counts as a conflict: an exception class, a tuple of them, or a plain
            function of an exception that returns True or False. It is asked about each error of
            the database, and about what the application raises, or answers with 400 and above.
        retry_after: Seconds. If no connection becomes free for a request within the engine's
            `pool_timeout`, and the request ends with that error or a status of 500, it is answered
            503 with this `Retry-After`. None: the error of the pool is left to the application.
        two_phase: Whether the sessions of a request commit in two phases, so that a COMMIT can no
            longer fail after another one succeeded. The drivers must support it.
        on_report: A plain function that is called once for each unit of work that has ended: the
            response's, before its status is sent; the body's or background task's; and each
            `begin()` and `on_commit` function inside of the request. It is called on the event loop
            (on its own thread for `SyncDatabase.begin()`), so it must be quick. What it raises is
            logged.

    Raises:
        ConfigurationError: An argument is not what it should be. In a running event loop, where
            frameworks make their middleware, and for a URL that cannot work, the startup of the
            server fails instead; or each request, if the server sends no startup.
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
        self.on_report: Callable[[UnitReport], object] | None = on_report
        usable = usable_databases(app, databases, unknown, vars(self), type(self))
        if isinstance(usable, Unstartable):
            self._startable: tuple[Startable, ...] = (usable,)
            self._serve: ASGIApp = usable.refuse
            self._serve_http: ASGIApp = usable.refuse
            return
        self._startable = self.databases = usable
        self._commit_rule = commit_rule(commit_when)
        self._serve = self._serve_one
        self._serve_http, self._observers = with_optional_rooms(
            self._serve_one,
            usable,
            attempts=attempts,
            retry_on=retry_on,
            retry_after=retry_after,
            on_commit_error=on_commit_error,
            on_report=on_report,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        kind = scope["type"]
        if kind == "http":
            # A middleware further out retries, and answers 503, for this one too.
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
            await self.app(scope, exchange.receive, exchange.send)
        except BaseException as error:
            await close(unit, commit=False, error=error)
            if unit.failure is None or not isinstance(error, ABORTED):
                raise
            add_note(unit.failure, error)
        else:
            # "Returned" is not "succeeded": a client that hangs up ends a stream like that.
            unit.closed = True
            if unit.is_used:
                commit = exchange.may_commit and not unit.rollback and unit.failure is None
                await close_returned(unit, commit=commit)
        finally:
            current_unit.reset(token)
            scope[_KEY] = outer
            unit.scope = None  # a task that outlives the request must not take part in it
        if unit.failure is not None:
            if unit.is_answered:
                raise unit.failure
            raise AbortRequest(unit.failure) from unit.failure
