"""Records if an attempt to run a request met a conflict, and if the attempt committed anything."""

import sys
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import Session
from typing_extensions import override

from asgi_dbsession.session._sqlalchemy import isolation_level_on_connect
from asgi_dbsession.session.end import End
from asgi_dbsession.session.guard import GuardedSession
from asgi_dbsession.session.lost import is_lost
from asgi_dbsession.session.read_only import may_only_read
from asgi_dbsession.unit.attempt import Attempt, RunningAttempt, running_attempt

from .causes import causes
from .conflicts import is_conflict
from .rule import Rule


class WatchedAttempt(RunningAttempt):
    """One attempt to run a request or a function, with its conflicts and COMMITs.

    A retry can follow if there was a conflict and no COMMIT.

    Attributes:
        conflict: The exception of the last conflict, or None.
        reason: The description of the conflict, for the log.
        committing: The connection on which a COMMIT with unknown result was sent, or None.
        has_committed: True if anything was committed, also by a statement in autocommit mode.
        stored: Called after a COMMIT, when no retry is possible: frees the stored request body.
        is_final: True if no retry can follow.
    """

    def __init__(self, attempt: Attempt, counts: Rule) -> None:
        super().__init__(attempt)
        self._counts = counts
        self._outer = running_attempt.get()
        self.conflict: BaseException | None = None
        self.reason: str = ""
        self.committing: Connection | None = None
        self.has_committed: bool = False
        self.stored: Callable[[], None] | None = None
        self.is_final: bool = False

    @property
    @override
    def can_retry(self) -> bool:
        is_stored = self.has_committed or self.committing is not None
        return self.conflict is not None and not is_stored and not self.is_final

    @override
    def will_retry(self, end: End) -> bool:
        # After a successful COMMIT, do not call the function `retry_on` of the application: if it
        # failed, the client would get an error although the work is stored.
        if end.succeeded:
            return False
        for error in (end.failure, end.handled):
            self.record_error(error)
        return self.can_retry

    def make_final(self) -> None:
        """Allow no retry of this attempt any more, whatever error has occurred or will occur."""
        self.conflict = self.committing = self.stored = None
        self.is_final = True

    def record_error(self, error: BaseException | None) -> None:
        """Store the error as the reason to retry, if the option `retry_on` selects this error."""
        if error is not None and self.conflict is None:
            found = next(filter(self._counts, causes(error)), None)
            if found is not None:
                self.record_conflict(found, _text(found))

    def record_handled_error(self) -> None:
        """Record the exception that the calling code handles now, if `retry_on` selects it.

        Called before an error response is sent. The framework may have caught the exception, and
        may send this response in an `except` block. If the exception is recorded, the request can
        be retried, and the response is then not sent.
        """
        self.record_error(sys.exception())

    def record_conflict(self, error: BaseException, reason: str) -> None:
        """Record a conflict as the reason for a retry. Do nothing if no retry can follow."""
        if not self.is_final:
            self.conflict, self.reason = error, reason

    def is_conflict(self, context: ExceptionContext) -> bool:
        """Return True if an error of the driver is a conflict or another reason to retry."""
        found = context.sqlalchemy_exception or context.original_exception
        is_conflicting = is_conflict(context.original_exception) or _is_lost_read(context)
        return is_conflicting or self._counts(found)

    def enclosing(self) -> "list[WatchedAttempt]":
        """Of this attempt and the attempts around it, return those that can still be retried.

        For example, an attempt of `run_transaction` can run inside an attempt of a request.
        """
        outer = self._outer
        rest = outer.enclosing() if isinstance(outer, WatchedAttempt) else []
        return [each for each in (self, *rest) if not each.is_final]


def watch_conflicts(engine: Engine) -> None:
    """Add listeners to an engine that record conflicts (deadlocks, for example) and COMMITs.

    The retry code needs both records: a request is retried after a conflict, unless it has
    committed something.
    """
    for name, listener in _LISTENERS.items():
        event.listen(engine, name, listener)


def unwatch_conflicts(engine: Engine) -> None:
    """Remove the listeners that `watch_conflicts` added to `engine`."""
    for name, listener in _LISTENERS.items():
        if event.contains(engine, name, listener):
            event.remove(engine, name, listener)


def _record_conflict(context: ExceptionContext) -> None:
    for attempt in _under_way():
        if attempt.is_conflict(context):
            _record_for(attempt, context)


def _record_for(attempt: WatchedAttempt, context: ExceptionContext) -> None:
    hidden = context.engine is not None and context.engine.hide_parameters
    error = context.original_exception
    reason = type(error).__name__ if hidden else _text(error)
    attempt.record_conflict(context.sqlalchemy_exception or error, reason)
    connection = context.connection
    if connection is None:
        return
    if _is_autocommit(connection):
        attempt.has_committed = True
    elif (
        context.statement is None
        and attempt.committing is connection
        and (not is_lost(context) or may_only_read(connection))
    ):
        # COMMIT failed and has certainly stored nothing: the connection was not lost, or the
        # transaction could only read. So allow a retry.
        attempt.committing = None


def _record_commit(connection: Connection, *_: object) -> None:
    # SQLAlchemy calls this function before it sends COMMIT, so the result of COMMIT is not known
    # yet.
    for attempt in _under_way():
        attempt.has_committed = attempt.has_committed or attempt.committing is not None
        attempt.committing = connection


def _record_rollback(connection: Connection) -> None:
    # In autocommit mode, the database has stored each statement already, and this ROLLBACK undoes
    # nothing. So record that the attempt has committed work. Then it is not retried.
    if _is_autocommit(connection):
        for attempt in _under_way():
            attempt.has_committed = True


def watch_sessions() -> None:
    """From now on, record each successful COMMIT of a session in the attempts that are running.

    The code that commits can run in two attempts at once: in an attempt of `run_transaction`,
    inside an attempt to serve the request. An attempt that has committed is not retried.
    """
    if not event.contains(GuardedSession, "after_commit", _record_stored):
        event.listen(GuardedSession, "after_commit", _record_stored)


def _record_stored(session: Session) -> None:
    # SQLAlchemy calls this function also when a savepoint is released. This commits nothing, so
    # there is nothing to record.
    if session.in_nested_transaction():
        return
    for attempt in _under_way():
        attempt.has_committed = attempt.has_committed or attempt.committing is not None
        attempt.committing = None
        if attempt.has_committed and attempt.stored is not None:
            attempt.stored()


def _under_way() -> list[WatchedAttempt]:
    """Of the attempts in which the calling code runs, return those that can still be retried.

    There can be two: an attempt of `run_transaction`, inside an attempt to serve the request.
    """
    attempt = running_attempt.get()
    return attempt.enclosing() if isinstance(attempt, WatchedAttempt) else []


_LISTENERS: dict[str, Any] = {
    "handle_error": _record_conflict,
    "commit": _record_commit,
    "commit_twophase": _record_commit,
    "rollback": _record_rollback,
}


def _is_autocommit(connection: Connection) -> bool:
    level = connection.get_execution_options().get("isolation_level")
    return (level or isolation_level_on_connect(connection)) == "AUTOCOMMIT"


def _text(error: BaseException) -> str:
    original = getattr(error, "orig", None) or error
    return f"{type(original).__name__}: {' '.join(str(original).split())}"


def _is_lost_read(context: ExceptionContext) -> bool:
    """Return True if the connection was lost in a transaction that could only read."""
    connection = context.connection
    # If an earlier error has invalidated the connection, this package cannot tell any more if the
    # transaction was read-only. So return False: the error is then no reason to retry.
    if connection is None or connection.invalidated:
        return False
    return is_lost(context) and may_only_read(connection)
