"""What an application wants done once its work is stored."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import TypeAlias

from anyio import to_thread
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

Function: TypeAlias = Callable[[], object] | Callable[[], Awaitable[object]]

_logger = logging.getLogger("asgi_dbsession")


@dataclass(slots=True, eq=False)
class AfterCommit:
    """A function to be called after COMMIT, and what became of the work it belongs to.

    Args:
        function: Takes nothing; may return something to await.
        in_thread: Whether it was given from a worker thread, and so is called in one.

    Attributes:
        is_stored: Whether the work was committed, be it by the application itself.
        is_undone: Whether the work was rolled back, be it only to a savepoint.
    """

    function: Function
    in_thread: bool
    is_stored: bool = False
    is_undone: bool = False
    _transactions: set[SessionTransaction] = field(default_factory=set)

    def follow(self, session: Session) -> None:
        """Learn what becomes of the transaction, and the savepoints, that the session is in."""
        transaction = session.get_nested_transaction() or session.get_transaction()
        while transaction is not None:
            self._transactions.add(transaction)
            transaction = transaction.parent
        event.listen(session, "after_commit", self._note_commit)
        event.listen(session, "after_soft_rollback", self._note_rollback)

    def _note_commit(self, session: Session) -> None:
        if not session.in_nested_transaction():  # it is told of savepoints too
            self.is_stored = self.is_stored or not self.is_undone

    def _note_rollback(self, _session: Session, transaction: SessionTransaction) -> None:
        if transaction in self._transactions or transaction.parent is None:
            self.is_undone = not self.is_stored

    async def call(self) -> None:
        """Call it; what it raises is logged, for nothing can undo the COMMIT."""
        try:
            result = await to_thread.run_sync(self.function) if self.in_thread else self.function()
            if isawaitable(result):
                await result
        except Exception as error:
            self._report(error)

    def call_blocking(self) -> None:
        """The same on the calling thread."""
        try:
            self.function()
        except Exception as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        _logger.error(
            "%r failed after COMMIT; what was committed stays.", self.function, exc_info=error
        )


async def call_all(functions: Iterable[AfterCommit]) -> None:
    """Call them in order, each although one before it failed."""
    for each in functions:
        await each.call()


def is_in_thread() -> bool:
    """Whether the caller runs in a worker thread of the event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False
