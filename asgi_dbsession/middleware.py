"""What happens to a request's unit of work, on each ASGI message."""

from collections.abc import Callable
from http import HTTPStatus
from inspect import iscoroutinefunction
from typing import Any, TypeAlias

from sqlalchemy import URL

from .async_database import AsyncDatabase
from .errors import ConfigurationError
from .lifespan import serve_lifespan
from .messages import CommitFailed, end_before_response, end_before_waiting
from .sync_database import SyncDatabase
from .types import ASGIApp, Receive, Scope, Send
from .unit_of_work import UnitOfWork, current_unit

AnyDatabase: TypeAlias = AsyncDatabase[Any] | SyncDatabase[Any]

# Where the unit of work of a request lies in its scope: a middleware further in joins it.
_KEY = "asgi_dbsession"


def below_400(status: int) -> bool:
    """Whether a status is no error: what `DBSessionMiddleware` goes by unless told otherwise."""
    return status < HTTPStatus.BAD_REQUEST


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

    Raises:
        ConfigurationError: A database or a callback is not what it should be.
    """

    def __init__(
        self,
        app: ASGIApp,
        *databases: AnyDatabase | str | URL,
        commit_when: Callable[[int], bool] = below_400,
        on_commit_error: Callable[[Exception], ASGIApp | None] | None = None,
    ) -> None:
        given = databases or (AsyncDatabase.from_env(),)
        self.app: ASGIApp = app
        self.databases: tuple[AnyDatabase, ...] = tuple(map(_as_database, given))
        self.commit_when: Callable[[int], bool] = commit_when
        self.on_commit_error: Callable[[Exception], ASGIApp | None] | None = on_commit_error
        if len(set(self.databases)) < len(self.databases):
            raise ConfigurationError(f"The same database was given twice: {self.databases}.")
        for name, function in (("commit_when", commit_when), ("on_commit_error", on_commit_error)):
            if function is not None and (not callable(function) or iscoroutinefunction(function)):
                raise ConfigurationError(f"{name} takes a plain function, not {function!r}.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] not in ("http", "websocket"):
            await self._serve_other(scope, receive, send)
            return
        enclosing = scope.get(_KEY)
        unit = scope[_KEY] = UnitOfWork(self.databases, scope, enclosing)
        unit.joins = enclosing is not None
        if scope["type"] == "http":
            guarded = receive, end_before_response(unit, self.commit_when, send)
        else:
            guarded = end_before_waiting(unit, receive, send)
        token = current_unit.set(unit)
        try:
            await self.app(scope, *guarded)
        except BaseException as error:
            await unit.close(commit=False)
            if unit.failure is None or not isinstance(error, _UNWOUND):
                raise
        else:
            # "Returned" is not "succeeded": a client that hangs up ends a stream just like that.
            commit = unit.may_commit and not unit.rollback and unit.failure is None
            await unit.close(commit=commit)
        finally:
            current_unit.reset(token)
            scope[_KEY] = enclosing
        if unit.failure is not None:
            await self._answer(unit.failure, scope, receive, None if unit.is_answered else send)

    async def _serve_other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await serve_lifespan(self.app, self.databases, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _answer(
        self, failure: Exception, scope: Scope, receive: Receive, send: Send | None
    ) -> None:
        if send is None or self.on_commit_error is None:
            raise failure
        try:
            answer = self.on_commit_error(failure)
            if answer is not None:
                await answer(scope, receive, send)
        except Exception as error:
            raise error from failure
        if answer is None:
            raise failure


# What a `CommitFailed` may have become on its way out, through frameworks and task groups.
_UNWOUND = (CommitFailed, Exception, BaseExceptionGroup)


def _as_database(given: AnyDatabase | str | URL) -> AnyDatabase:
    if isinstance(given, AsyncDatabase | SyncDatabase):
        return given
    if isinstance(given, str | URL):
        return AsyncDatabase(given)
    raise ConfigurationError(
        "DBSessionMiddleware takes a URL, an AsyncDatabase or a SyncDatabase, not something of "
        f"type {type(given).__name__}; an engine goes into `AsyncDatabase.from_engine(engine)`."
    )
