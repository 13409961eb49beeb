"""Keeps the functions that an application gives to `on_commit`, and calls them after COMMIT."""

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import Any, TypeAlias

from anyio import to_thread
from sqlalchemy.orm import Session, SessionTransaction

from asgi_dbsession.errors import ConfigurationError, name_of
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.roll_back import with_outer

Function: TypeAlias = Callable[[], object] | Callable[[], Awaitable[object]]

_logger = logging.getLogger("asgi_dbsession")


@dataclass(slots=True, eq=False)
class AfterCommit:
    """A function given to `on_commit`, with the uncommitted work that it waits for.

    Attributes:
        given_by: The task that called `on_commit`. None if a worker thread called it.
        committed: True if all work that the function waits for was committed.
        rolled_back: True if a part of this work was rolled back. The function is then not called.
    """

    function: Function
    databases: tuple[Any, ...]
    given_by: object
    read_only: bool
    committed: bool = False
    rolled_back: bool = False
    _attached: list[ManagedSession[Any]] = field(default_factory=list)
    _pending: set[Session] = field(default_factory=set)
    _transactions: set[SessionTransaction] = field(default_factory=set)

    def attach(self, opened: ManagedSession[Any]) -> None:
        """Call the `on_commit` function only after the session has committed its open transaction.

        After a rollback of this transaction, or of a savepoint that is open now, the function is
        never called.
        """
        session = opened.orm
        if session.in_transaction():
            self._pending.add(session)
        innermost = session.get_nested_transaction() or session.get_transaction()
        self._transactions.update(with_outer(innermost))
        self._attached.append(opened)
        opened.companion.followers.append(self)

    def detach(self) -> None:
        """Remove all references to sessions, so that Python can free the sessions at once."""
        for opened in self._attached:
            opened.companion.followers.remove(self)
        self._attached.clear()
        self._pending.clear()
        self._transactions.clear()

    def waits_for_others(self, sessions: Iterable[ManagedSession[Any]]) -> bool:
        """Return True if the `on_commit` function also waits for a session not in `sessions`.

        The function waits for the COMMIT of each session that was in a transaction when `on_commit`
        was called.
        """
        others = self._pending.difference(each.orm for each in sessions)
        return any(each.in_transaction() for each in others)

    def should_run(self, *, success: bool) -> bool:
        """Return True if the `on_commit` function must be called after this commit or rollback.

        If there was uncommitted work when `on_commit` was called, the function runs after this work
        was committed. Otherwise the function runs if the unit of work was committed (`success` is
        True).
        """
        return self.committed or (success and not self.rolled_back and not self._pending)

    def record_commit(self, session: Session) -> None:
        """Called after a COMMIT of `session`.

        The function given to `on_commit` need not wait for this session any more. It may still wait
        for the COMMIT of other sessions.
        """
        if session in self._pending and session.get_transaction() not in self._transactions:
            # Never call the `on_commit` function. The session has committed another transaction
            # than the one that was open when `on_commit` was called. So that earlier transaction
            # was rolled back, and SQLAlchemy has not reported this to a listener.
            self.rolled_back = True
        self._pending.discard(session)
        self.committed = self.committed or not (self._pending or self.rolled_back)

    def record_rollback(self, transaction: SessionTransaction) -> None:
        """Called after a rollback.

        If the work that the `on_commit` function waits for is undone, the function is never called.
        """
        # If there was no uncommitted work when `on_commit` was called, its function is called after
        # the next COMMIT. If the next transaction is rolled back, the function is never called.
        is_next = transaction.parent is None and not self._pending
        if transaction in self._transactions or is_next:
            self.rolled_back = not self.committed

    async def call(self) -> None:
        """Call the function that was given to `on_commit`. If it is a coroutine function, await it.

        If a worker thread called `on_commit`, call the function in a worker thread. Otherwise call
        the function on the event loop.
        """
        is_from_thread = self.given_by is None
        result = await to_thread.run_sync(self.function) if is_from_thread else self.function()
        if isawaitable(result):
            await result

    def call_blocking(self) -> None:
        """Call the `on_commit` function on this thread. It must be a plain function.

        Raises:
            ConfigurationError: The function has returned a coroutine, for example. On this thread,
                nothing can be awaited.
        """
        result = self.function()
        if isawaitable(result):
            if isinstance(result, Coroutine):
                # Close the coroutine, so that Python does not warn about a coroutine that was never
                # awaited.
                result.close()
            raise refusal_to_await(self.function)

    def log(self, error: BaseException) -> None:
        """Log an exception of the `on_commit` function; the COMMIT before it has succeeded."""
        name = name_of(self.function)
        _logger.error(
            "The on_commit function %s failed; the committed work stays stored.",
            name,
            exc_info=error,
        )


def refusal_to_await(function: Function) -> ConfigurationError:
    """Return the error for a coroutine function given to `on_commit` in `SyncDatabase.begin()`."""
    return ConfigurationError(
        "on_commit takes a plain function inside SyncDatabase.begin(), where nothing can be "
        f"awaited, and {name_of(function)} is a coroutine function. Write it with `def`."
    )
