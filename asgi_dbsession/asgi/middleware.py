"""What happens to a request's unit of work, on each ASGI message."""

from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any, TypeAlias

from sqlalchemy import URL
from typing_extensions import Never

from asgi_dbsession.errors import UNWOUND, ConfigurationError
from asgi_dbsession.reports.recorder import ReportedUnit
from asgi_dbsession.reports.report import UnitReport
from asgi_dbsession.retry.attempt import watch_races, will_run_again
from asgi_dbsession.retry.overload import answer_overload
from asgi_dbsession.retry.retry import serve_until_won
from asgi_dbsession.session.two_phases import refuse_one_phase
from asgi_dbsession.types import ASGIApp, Receive, Scope, Send
from asgi_dbsession.unit.unit_of_work import UnitOfWork, current_unit

from .arguments import (
    AnyDatabase,
    application_first,
    check_application,
    check_databases,
    check_function,
    check_names,
    check_number,
    databases_of,
    in_event_loop,
    no_application,
)
from .lifespan import Startable, Unstartable, serve_lifespan
from .messages import end_before_waiting, end_then_send

_BeginUnit: TypeAlias = Callable[[tuple[Any, ...], Scope, UnitOfWork | None], UnitOfWork]

_BAD_REQUEST = int(HTTPStatus.BAD_REQUEST)  # an enumeration is slow to ask

# Where the unit of work of a request lies in its scope: a middleware further in joins it.
_KEY = "asgi_dbsession"
# What lies there instead while a run begins that others may precede or follow.
_RUN = object()


def below_400(status: int) -> bool:
    """Whether a status is no error: what `DBSessionMiddleware` goes by unless told otherwise."""
    return status < _BAD_REQUEST


class DBSessionMiddleware:
    """Give each request one session per database, and end it before the client hears of it.

    1. A session is opened when the application first asks for it; none otherwise.
    2. The start of a response whose status is below 400 waits for COMMIT, and is sent only then.
    3. On any other status, an exception, a cancellation, or no response: ROLLBACK.
    4. A COMMIT that fails sends nothing of the response, and runs nothing that was to follow it.
    5. Streaming bodies and background tasks go on with the same session, as a unit of their own:
       committed when they end, rolled back when they fail.
    6. When the application returns, its sessions are closed for good.

    On a WebSocket, the work of a task is committed before it sends, and before it waits to receive;
    a denial, an exception or a close code other than 1000 and 1001 rolls back.

    Databases are started before the application's own startup and stopped after its shutdown.
    Other scopes, and messages that are none of the above, pass untouched.

    Args:
        app: The ASGI application.
        *databases: An `AsyncDatabase`, a `SyncDatabase`, or a URL (for an `AsyncDatabase`) each;
            the first is the default. None at all: `AsyncDatabase.from_env()`.
        commit_when: A plain function that replaces `status < 400` in rules 2 and 3.
        on_commit_error: A plain function that makes the response to a COMMIT that failed: an ASGI
            application, such as a Starlette `Response`. Where it returns None, and where there is
            none, the original exception is raised to the server.
        attempts: How often a request may run when its transaction loses a race: a serialization
            failure, a deadlock, a busy SQLite. It runs again from the top as if it were the first
            time, with the same body, after a random pause of at most a second; never once
            anything was sent, or committed on a database of this package, never where the race
            was lost under AUTOCOMMIT, never with a body of more than 1 MiB, never when cancelled.
            What its handler does elsewhere is done again.
        retry_after: Seconds. Where a request waits in vain for a connection (the engine's
            `pool_timeout`), and ends with that error or a status of 500, it is answered 503 with
            this `Retry-After`. None: the error of the pool is left to the application.
        two_phase: Whether the sessions of a request commit in two phases, so that a COMMIT can no
            longer fail after another one succeeded. The drivers must support it.
        on_report: A plain function that is called once for each unit of work that has ended: the
            response's, before its status is sent; the body's or background task's; and each
            `begin()` and `on_commit` function inside of the request. It is called on the event loop
            (on its own thread for `SyncDatabase.begin()`), so it must be quick; what it raises is
            logged.

    Raises:
        ConfigurationError: An argument is not what it should be. In a running event loop, where
            frameworks make their middleware, and for a URL that cannot work, the startup of the
            server fails instead; or each request, where no startup is sent.
    """

    def __init__(
        self,
        app: ASGIApp = no_application,
        /,
        *databases: AnyDatabase | str | URL,
        commit_when: Callable[[int], bool] = below_400,
        on_commit_error: Callable[[Exception], ASGIApp | None] | None = None,
        attempts: int = 1,
        retry_after: int | None = None,
        two_phase: bool = False,
        on_report: Callable[[UnitReport], object] | None = None,
        **unknown: Never,
    ) -> None:
        app, databases = application_first(app, databases, unknown)
        self.app: ASGIApp = app
        self.databases: tuple[AnyDatabase, ...] = ()
        self.commit_when: Callable[[int], bool] = commit_when
        self.on_commit_error: Callable[[Exception], ASGIApp | None] | None = on_commit_error
        self.attempts: int = attempts
        self.retry_after: int | None = retry_after
        self.two_phase: bool = two_phase
        self.on_report: Callable[[UnitReport], object] | None = on_report
        self._begin_unit: _BeginUnit = UnitOfWork
        self._around: ASGIApp | None = None
        self._startable: tuple[Startable, ...]
        try:
            self._check_arguments(databases, unknown)
        except ConfigurationError as error:
            if not in_event_loop():
                raise
            self._refuse_all(error)
            return
        try:
            self._startable = self.databases = databases_of(databases)
            for database in self.databases if two_phase else ():
                refuse_one_phase(database, database.url)
        except ConfigurationError as error:
            self._refuse_all(error)
            return
        if on_report is not None:
            self._begin_unit = partial(ReportedUnit, on_report)
            for database in self.databases:
                database._measure()
        if retry_after is not None:
            self._around = partial(answer_overload, self._serve, retry_after)
        if attempts > 1:
            watch_races()
            self._around = partial(serve_until_won, self._around or self._serve, attempts)

    def _check_arguments(
        self, databases: tuple[object, ...], unknown: Mapping[str, object]
    ) -> None:
        check_application(self.app)
        check_names(unknown, type(self).__init__)
        check_databases(databases)
        check_function("commit_when", self.commit_when)
        if self.on_commit_error is not None:
            check_function("on_commit_error", self.on_commit_error)
        if self.on_report is not None:
            check_function("on_report", self.on_report)
        check_number("attempts", self.attempts)
        if self.retry_after is not None:
            check_number("retry_after", self.retry_after)

    def _refuse_all(self, reason: ConfigurationError) -> None:
        """Have the startup fail, and each request where no startup is sent."""
        unstartable = Unstartable(reason)
        self._startable, self._begin_unit = (unstartable,), unstartable.refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        is_http = scope["type"] == "http"
        if not is_http and scope["type"] != "websocket":
            await self._serve_other(scope, receive, send)
            return
        enclosing = scope.get(_KEY)
        if self._around is not None and is_http:
            if enclosing is None:
                await self._around(scope, receive, send)
                return
            enclosing = None if enclosing is _RUN else enclosing
        unit = scope[_KEY] = self._begin_unit(self.databases, scope, enclosing)
        unit.joins = enclosing is not None
        unit.two_phase = self.two_phase
        unguarded_send = send
        if is_http:
            send = partial(end_then_send, unit, self.commit_when, send)
        else:
            receive, send = end_before_waiting(unit, receive, send)
        token = current_unit.set(unit)
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            await unit.close(commit=False)
            if unit.failure is None or not isinstance(error, UNWOUND):
                raise
        else:
            unit.over = True
            if unit.is_used:
                # "Returned" is not "succeeded": a client that hangs up ends a stream like that.
                commit = unit.may_commit and not unit.rollback and unit.failure is None
                await unit.close(commit=commit)
        finally:
            current_unit.reset(token)
            scope[_KEY] = enclosing
        if unit.failure is not None:
            if unit.is_answered:
                raise unit.failure
            await self._answer(unit.failure, scope, receive, unguarded_send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not the body of `__call__`: there, every request would pay for another coroutine.
        scope[_KEY] = _RUN
        await self(scope, receive, send)

    async def _serve_other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await serve_lifespan(self.app, self._startable, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _answer(self, failure: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        if self.on_commit_error is None or will_run_again():
            raise failure
        try:
            answer = self.on_commit_error(failure)
            if answer is not None:
                await answer(scope, receive, send)
        except Exception as error:
            raise error from failure
        if answer is None:
            raise failure
