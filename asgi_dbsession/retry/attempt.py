"""One run of a request, which may lose a race with another one in the database."""

from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext

from asgi_dbsession.errors import UNWOUND, Unwound
from asgi_dbsession.session.commit import watched
from asgi_dbsession.types import ASGIApp, Message, Scope, Send

from .replay import Replay

# Transaction rollback (40), but for 40003, which leaves open whether COMMIT came through.
# Source: https://www.postgresql.org/docs/current/errcodes-appendix.html
_ROLLBACK, _UNKNOWN = "40", "40003"
# Deadlock, lock wait timeout, and a record that changed since it was read.
# Source: https://mariadb.com/kb/en/mariadb-error-code-reference/
_MYSQL = (1213, 1205, 1020)
# Its extensions are in the higher bits: https://www.sqlite.org/rescode.html
_SQLITE_BUSY = 5


class Attempt:
    """One run of a request that may be followed by another one.

    Args:
        body: What the client sends.

    Attributes:
        lost: What the database said of the last race that it lost.
        is_answered: Whether anything was sent. From then on nothing more is noted here.
        committing: The connection whose COMMIT was the last; it may have come through, or not.
        has_committed: Whether an earlier one did, as far as is known; AUTOCOMMIT is one too.
    """

    def __init__(self, body: Replay) -> None:
        self._body = body
        self._is_withheld = False
        self.lost: BaseException | None = None
        self.is_answered: bool = False
        self.committing: Connection | None = None
        self.has_committed: bool = False

    @property
    def is_futile(self) -> bool:
        """Whether it can be followed by another one as if it had never been."""
        is_stored = self.has_committed or self.committing is not None
        can_follow = self._body.is_kept and not self.is_answered and not is_stored
        return can_follow and self.lost is not None

    @property
    def owes_answer(self) -> bool:
        """Whether a client still waits for the response, or the error, that was withheld."""
        return self._is_withheld and not self._body.is_client_gone

    async def serve(self, serve: ASGIApp, scope: Scope, send: Send) -> None:
        """Serve the request; a response that is as futile as the attempt is not sent."""

        async def send_unless_futile(message: Message) -> None:
            # Whatever its framework made of the error; a success says that it got over it.
            if self._is_withheld or (self.is_futile and not _is_success(message)):
                self._is_withheld = True
                raise Unwound
            self.is_answered = True
            self.lost = self.committing = None
            await send(message)

        token = _current.set(self)
        try:
            await serve(scope, self._body.from_start(), send_unless_futile)
        except UNWOUND:
            self._is_withheld = self._is_withheld or self.is_futile
            if not self._is_withheld:
                raise
        finally:
            _current.reset(token)


_current: ContextVar[Attempt | None] = ContextVar("asgi_dbsession.attempt", default=None)


def will_run_again() -> bool:
    """Whether the attempt that is under way can be followed by another one, and so will be."""
    attempt = _current.get()
    return attempt is not None and attempt.is_futile


def watch_races() -> None:
    """Have attempts hear of lost races on any engine, and of COMMITs on each that a database has.

    An engine of the application's own may commit what a request does not undo: a log, a counter.
    Not before someone wants attempts: these listeners cost every request some microseconds.
    """
    for name, listener in _LISTENERS.items():
        if not event.contains(Engine, name, listener):
            event.listen(Engine, name, listener)


def _note_race(context: ExceptionContext) -> None:
    attempt = _under_way()
    if attempt is None or not _is_lost_race(context.original_exception):
        return
    attempt.lost = context.sqlalchemy_exception or context.original_exception
    connection = context.connection
    if connection is not None and _commits_by_itself(connection):
        attempt.has_committed = True
    elif context.statement is None and attempt.committing is connection:
        attempt.committing = None  # it was this COMMIT that failed


def _note_commit(connection: Connection, *_: object) -> None:
    attempt = _under_way()
    if attempt is not None and connection.dialect in watched:  # SQLAlchemy tells of it just before
        attempt.has_committed = attempt.has_committed or attempt.committing is not None
        attempt.committing = connection


def _under_way() -> Attempt | None:
    """The attempt that what happens here counts for; a task may well outlive it."""
    attempt = _current.get()
    return None if attempt is None or attempt.is_answered else attempt


_LISTENERS: dict[str, Callable[..., None]] = {
    "handle_error": _note_race,
    "commit": _note_commit,
    "commit_twophase": _note_commit,
}


def _is_lost_race(error: Any) -> bool:
    if error.args and error.args[0] in _MYSQL:  # before its SQLSTATE, which says nothing of 1205
        return True
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)  # psycopg2's name
    if isinstance(state, str):
        return state.startswith(_ROLLBACK) and state != _UNKNOWN
    sqlite_code = getattr(error, "sqlite_errorcode", None)
    return isinstance(sqlite_code, int) and sqlite_code & 0xFF == _SQLITE_BUSY


def _commits_by_itself(connection: Connection) -> bool:
    level = connection.get_execution_options().get("isolation_level")
    return (level or connection.dialect._on_connect_isolation_level) == "AUTOCOMMIT"


def _is_success(message: Message) -> bool:
    is_start: bool = message["type"] == "http.response.start"
    return is_start and message["status"] < HTTPStatus.BAD_REQUEST
