"""What an application wants done once its work is stored."""

import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import Any, TypeAlias

from anyio import get_current_task, to_thread
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.session.guard import SessionInTurn

from .managed_session import SessionSource

Function: TypeAlias = Callable[[], object] | Callable[[], Awaitable[object]]

_logger = logging.getLogger("asgi_dbsession")

# Where a session keeps what follows it.
_FOLLOWERS = "_followers"


@dataclass(slots=True, eq=False)
class AfterCommit:
    """A function to be called after COMMIT, and what became of the work it belongs to.

    Args:
        function: Takes nothing; may return something to await.
        databases: Whose sessions it can ask for: those that could be where it was given.
        in_thread: Whether it was given from a worker thread, and so is called in one.

    Attributes:
        is_stored: Whether all of the work was committed, be it by the application itself.
        is_undone: Whether any of the work was rolled back, be it only to a savepoint.
    """

    function: Function
    databases: tuple[SessionSource[Any], ...]
    in_thread: bool
    is_stored: bool = False
    is_undone: bool = False
    _sessions: list[Session] = field(default_factory=list)
    _pending: set[Session] = field(default_factory=set)
    _transactions: set[SessionTransaction] = field(default_factory=set)

    def follow(self, session: Session) -> None:
        """Learn what becomes of the transaction, and the savepoints, that the session is in."""
        if session.in_transaction():
            self._pending.add(session)
        transaction = session.get_nested_transaction() or session.get_transaction()
        while transaction is not None:
            self._transactions.add(transaction)
            transaction = transaction.parent
        self._sessions.append(session)
        vars(session).setdefault(_FOLLOWERS, []).append(self)

    def forget(self) -> None:
        """Let go of the sessions; otherwise they would wait for the garbage collector."""
        for session in self._sessions:
            vars(session)[_FOLLOWERS].remove(self)
        self._sessions.clear()
        self._pending.clear()
        self._transactions.clear()

    @property
    def is_due(self) -> bool:
        """Whether it is to be called, where all that was left has been committed."""
        return self.is_stored or not (self.is_undone or self._pending)

    def note_commit(self, session: Session) -> None:
        """What that session has done is stored."""
        if session in self._pending and session.get_transaction() not in self._transactions:
            self.is_undone = True  # by closing that transaction, of which nobody is told
        self._pending.discard(session)
        self.is_stored = self.is_stored or not (self._pending or self.is_undone)

    def note_rollback(self, transaction: SessionTransaction) -> None:
        """What was done in that transaction, or savepoint, is gone."""
        if transaction in self._transactions or transaction.parent is None:
            self.is_undone = not self.is_stored

    async def call(self) -> None:
        """Call it where it was given."""
        result = await to_thread.run_sync(self.function) if self.in_thread else self.function()
        if isawaitable(result):
            await result

    def call_blocking(self) -> None:
        """Call it on this thread, where nothing can be awaited."""
        result = self.function()
        if isawaitable(result):
            if isinstance(result, Coroutine):
                result.close()  # or Python would warn that nobody awaited it
            raise refusal_to_await(self.function)

    def report(self, error: BaseException) -> None:
        """Log what it raised, for nothing can undo the COMMIT."""
        _logger.error(
            "%r failed after COMMIT; what was committed stays.", self.function, exc_info=error
        )


def refusal_to_await(function: Function) -> ConfigurationError:
    """What is said of a function that would have to be awaited."""
    return ConfigurationError(
        f"on_commit takes a plain function inside SyncDatabase.begin(), not {function!r}."
    )


def is_in_thread() -> bool:
    """Whether the caller runs in a worker thread of the event loop."""
    try:
        get_current_task()
    except RuntimeError:
        return True
    return False


def _note_commit(session: Session) -> None:
    for each in vars(session).get(_FOLLOWERS, ()):
        if not session.in_nested_transaction():  # it is told of savepoints too
            each.note_commit(session)


def _note_rollback(session: Session, transaction: SessionTransaction) -> None:
    for each in vars(session).get(_FOLLOWERS, ()):
        each.note_rollback(transaction)


event.listen(SessionInTurn, "after_commit", _note_commit)
event.listen(SessionInTurn, "after_soft_rollback", _note_rollback)
