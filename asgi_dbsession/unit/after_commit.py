"""What an application wants done once its work is stored."""

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import Any, TypeAlias

from anyio import to_thread
from sqlalchemy.orm import Session, SessionTransaction

from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.session.managed import ManagedSession

Function: TypeAlias = Callable[[], object] | Callable[[], Awaitable[object]]

_logger = logging.getLogger("asgi_dbsession")


@dataclass(slots=True, eq=False)
class AfterCommit:
    """A function to be called after COMMIT, and what became of the work that it belongs to.

    Args:
        function: Takes no arguments; may return something to await.
        databases: Those whose sessions were available where the function was given.
        in_thread: Whether it was given in a worker thread, and so is called in one.
        given_by: The task that gave it; None in a worker thread.

    Attributes:
        committed: Whether all of the work was committed, also if the application did it itself.
        rolled_back: Whether any of the work was rolled back, also if only to a savepoint.
    """

    function: Function
    databases: tuple[Any, ...]
    in_thread: bool
    given_by: object
    committed: bool = False
    rolled_back: bool = False
    _attached: list[ManagedSession[Any]] = field(default_factory=list)
    _pending: set[Session] = field(default_factory=set)
    _transactions: set[SessionTransaction] = field(default_factory=set)

    def attach(self, opened: ManagedSession[Any]) -> None:
        """Follow the transaction, and the savepoints, that the session is in."""
        session = opened.orm
        if session.in_transaction():
            self._pending.add(session)
        transaction = session.get_nested_transaction() or session.get_transaction()
        while transaction is not None:
            self._transactions.add(transaction)
            transaction = transaction.parent
        self._attached.append(opened)
        opened.companion.followers.append(self)

    def detach(self) -> None:
        """Let go of the sessions; otherwise they would wait for the garbage collector."""
        for opened in self._attached:
            opened.companion.followers.remove(self)
        self._attached.clear()
        self._pending.clear()
        self._transactions.clear()

    def waits_for_others(self, sessions: Iterable[ManagedSession[Any]]) -> bool:
        """Whether its work is also in open transactions of other sessions than these."""
        others = self._pending.difference(each.orm for each in sessions)
        return any(each.in_transaction() for each in others)

    def should_run(self, *, success: bool) -> bool:
        """Whether to call it: its work is stored, or it waits for none and all went well."""
        return self.committed or (success and not self.rolled_back and not self._pending)

    def record_commit(self, session: Session) -> None:
        """What that session has done is stored."""
        if session in self._pending and session.get_transaction() not in self._transactions:
            # That transaction was closed without a commit, which SQLAlchemy does not report.
            self.rolled_back = True
        self._pending.discard(session)
        self.committed = self.committed or not (self._pending or self.rolled_back)

    def record_rollback(self, transaction: SessionTransaction) -> None:
        """What was done in that transaction, or savepoint, is gone."""
        if transaction in self._transactions or transaction.parent is None:
            self.rolled_back = not self.committed

    async def call(self) -> None:
        """Call it where it was given: on the event loop or in a worker thread."""
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

    def log(self, error: BaseException) -> None:
        """Log what the function raised, because nothing can undo the COMMIT."""
        name = name_of(self.function)
        _logger.error("%s failed after COMMIT; what was committed stays.", name, exc_info=error)


def refusal_to_await(function: Function) -> ConfigurationError:
    """The error for a function that would have to be awaited."""
    return ConfigurationError(
        "on_commit takes a plain function inside SyncDatabase.begin(), where nothing can be "
        f"awaited, and {name_of(function)} is a coroutine function. Write it with `def`."
    )


def name_of(function: object) -> str:
    """The name of a function, without its arguments: those of a `partial` may be secret."""
    inner = getattr(function, "func", function)
    return getattr(inner, "__qualname__", type(inner).__name__)
