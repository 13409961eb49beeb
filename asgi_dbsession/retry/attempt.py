"""One run of a request, which the database may refuse because of a conflict."""

from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from typing_extensions import override

from asgi_dbsession.session._sqlalchemy import isolation_level_on_connect
from asgi_dbsession.types import ASGIApp, Message, Receive, Scope, Send

from .replay import Replay
from .withholding import Withholding

# Transaction rollback (40), but for 40003, which leaves open whether COMMIT arrived.
# Source: https://www.postgresql.org/docs/current/errcodes-appendix.html
_ROLLBACK, _UNKNOWN = "40", "40003"
# A migration changed the type of a column that a prepared statement returns. The statement is
# prepared again after ROLLBACK. asyncpg has a class for it, which is free of the server's language.
_NOT_SUPPORTED, _STALE_PLAN = "0A000", "cached plan must not change result type"
_STALE_PLAN_CLASS = "InvalidCachedStatementError"
# Deadlock, lock wait timeout, and a record that changed since it was read.
# Source: https://mariadb.com/kb/en/mariadb-error-code-reference/
_MYSQL = (1213, 1205, 1020)
# Its extensions are in the higher bits: https://www.sqlite.org/rescode.html
_SQLITE_BUSY = 5


class Attempt(Withholding):
    """One run of a request that another run may follow.

    Args:
        body: What the client sends.

    Attributes:
        conflict: What the database said of the last conflict.
        committing: The connection with the last COMMIT, which may have arrived or not.
        has_committed: Whether an earlier COMMIT arrived, as far as known. A statement under
            AUTOCOMMIT is one too.
    """

    def __init__(self, body: Replay) -> None:
        super().__init__()
        self._body = body
        self.conflict: BaseException | None = None
        self.committing: Connection | None = None
        self.has_committed: bool = False

    @property
    def can_retry(self) -> bool:
        """Whether the request can run again as if this run had never been."""
        is_stored = self.has_committed or self.committing is not None
        is_untouched = self._body.is_kept and not self.is_answered and not is_stored
        return is_untouched and self.conflict is not None

    @property
    def owes_answer(self) -> bool:
        """Whether a client still waits for the response, or the error, that was withheld."""
        return self.is_withheld and not self._body.is_client_gone

    @override
    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_forget(message: Message) -> None:
            self.conflict = self.committing = None  # there can be no other run
            self._body.let_go()
            await send(message)

        token = _current.set(self)
        try:
            await super().serve(app, scope, self._body.from_start(), send_and_forget)
        finally:
            _current.reset(token)

    @override
    def withholds_message(self, message: Message) -> bool:
        # Whatever the framework made of the error; a success says that it was handled.
        return self.can_retry and not _is_success(message)

    @override
    def withholds_error(self, error: BaseException) -> bool:
        return self.can_retry


_current: ContextVar[Attempt | None] = ContextVar("asgi_dbsession.attempt", default=None)


def unless_retried(
    on_commit_error: Callable[[Exception], ASGIApp | None],
) -> Callable[[Exception], ASGIApp | None]:
    """Answer a COMMIT that failed only if the request does not run again because of it."""

    def answer_last(failure: Exception) -> ASGIApp | None:
        attempt = _current.get()
        will_retry = attempt is not None and attempt.can_retry
        return None if will_retry else on_commit_error(failure)

    return answer_last


def watch_conflicts(engine: Engine) -> None:
    """Have attempts learn of the conflicts and COMMITs on an engine; twice is the same as once."""
    for name, listener in _LISTENERS.items():
        event.listen(engine, name, listener)


def unwatch_conflicts(engine: Engine) -> None:
    """Undo `watch_conflicts`."""
    for name, listener in _LISTENERS.items():
        if event.contains(engine, name, listener):
            event.remove(engine, name, listener)


def _record_conflict(context: ExceptionContext) -> None:
    attempt = _under_way()
    if attempt is None or not is_conflict(context.original_exception):
        return
    attempt.conflict = context.sqlalchemy_exception or context.original_exception
    connection = context.connection
    if connection is not None and _is_autocommit(connection):
        attempt.has_committed = True
    elif context.statement is None and attempt.committing is connection:
        attempt.committing = None  # this COMMIT has failed


def _record_commit(connection: Connection, *_: object) -> None:
    attempt = _under_way()
    if attempt is not None:  # SQLAlchemy tells of it just before
        attempt.has_committed = attempt.has_committed or attempt.committing is not None
        attempt.committing = connection


def _under_way() -> Attempt | None:
    """The attempt that what happens here counts for. A task may outlive its attempt."""
    attempt = _current.get()
    return None if attempt is None or attempt.is_answered else attempt


_LISTENERS: dict[str, Any] = {
    "handle_error": _record_conflict,
    "commit": _record_commit,
    "commit_twophase": _record_commit,
}


def is_conflict(error: Any) -> bool:
    """Whether an error of a driver is a serialization failure, a deadlock or a busy SQLite."""
    if error.args and error.args[0] in _MYSQL:  # before its SQLSTATE, which says nothing of 1205
        return True
    if type(error).__name__ == _STALE_PLAN_CLASS:  # some versions give it no SQLSTATE
        return True
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)  # psycopg2's name
    if isinstance(state, str):
        if state == _NOT_SUPPORTED:
            return _STALE_PLAN in str(error)
        return state.startswith(_ROLLBACK) and state != _UNKNOWN
    sqlite_code = getattr(error, "sqlite_errorcode", None)
    return isinstance(sqlite_code, int) and sqlite_code & 0xFF == _SQLITE_BUSY


def _is_autocommit(connection: Connection) -> bool:
    level = connection.get_execution_options().get("isolation_level")
    return (level or isolation_level_on_connect(connection)) == "AUTOCOMMIT"


def _is_success(message: Message) -> bool:
    is_start: bool = message["type"] == "http.response.start"
    return is_start and message["status"] < HTTPStatus.BAD_REQUEST
