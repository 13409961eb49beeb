"""One session that a unit of work opened, and how its work ends: whole, or not at all."""

from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction

from ._sqlalchemy import flush_and_prepare, forget
from .failures import failed_transactions, refuse_if_aborted, watch
from .guard import Companion, GuardedSession
from .lock import End, SessionLock
from .reads import begin_before_savepoint, begin_now
from .transaction import LockedTransaction

S = TypeVar("S")


class ManagedSession(Generic[S]):
    """What a unit of work knows of a session that it opened.

    Args:
        session: What the application works with, made by a class from `guarded_class`.
        orm: The `sqlalchemy.orm.Session` behind it; `session` itself where that is one.
        companion: Given to the session.
        run: Calls a function where it may block. The one difference of async and sync.

    Attributes:
        is_prepared: Whether `prepare` has been called, and holds the lock for `end`.
    """

    is_prepared: bool = False

    def __init__(
        self,
        session: S,
        orm: Session,
        companion: Companion,
        run: Callable[..., Awaitable[None]],
    ) -> None:
        self.session: S = session
        self.orm: Session = orm
        self.companion: Companion = companion
        self.lock: SessionLock = companion.lock
        self.run: Callable[..., Awaitable[None]] = run
        vars(orm)["_companion"] = companion

    @property
    def has_work(self) -> bool:
        """Whether there is anything to commit or roll back, or an operation in flight."""
        # in_transaction() knows of flushed and Core writes; the others of what another task changed
        # or added while an earlier COMMIT was under way.
        session, lock = self.orm, self.lock
        is_changed = session.in_transaction() or session.identity_map.check_modified()
        return is_changed or lock.is_busy or (lock.is_used and bool(session.new))

    def close_if_idle(self) -> bool:
        """Close the session permanently if it has no work, without talking to the database.

        Returns:
            False if it has work: then `end` must be called.
        """
        with self.lock.mutex:
            if self.has_work or type(self.orm).close is not GuardedSession.close:
                return False
            self.lock.is_closed = True
        if list(self.orm):
            self.orm.expunge_all()
        return True

    def prepare(self, end: End) -> None:
        """Do what can fail before COMMIT: flush, and PREPARE in two phases. `end` must follow.

        Raises:
            TransactionAborted: The application swallowed an error that aborted the transaction.
            Exception: Whatever flush and PREPARE raised. Everything was rolled back.
        """
        self.lock.acquire_for_end(end)
        try:
            flush_and_prepare(self.orm)
            if not self.orm.twophase:  # else the database was asked right before PREPARE
                refuse_if_aborted(self.companion.connections)
        except BaseException:
            try:
                _roll_back(self.orm)
            finally:
                self.lock.release()
            raise
        self.is_prepared = True

    def end(self, end: End, commit: bool) -> None:
        """Commit or roll back what was done so far, after the operation in flight.

        Whatever happens, the connection is back in its pool afterwards, or was thrown away.

        Args:
            end: The end of the unit of work that this is part of.
            commit: False rolls back; another database may have failed to commit.

        Raises:
            TransactionAborted: The application swallowed an error that aborted the transaction.
            Exception: Whatever flush and COMMIT raised. Everything was rolled back.
        """
        if not self.is_prepared:
            self.lock.acquire_for_end(end)
        # With nobody to agree with, one phase stores sooner and leaves nothing in doubt.
        is_alone = self.orm.twophase and not self.is_prepared and self._has_one_connection
        if is_alone:
            self.orm.twophase = False
        try:
            if commit:
                self.orm.commit()
            else:
                _roll_back(self.orm)
        except BaseException:
            # close() alone would give the pool a connection that is still inside the transaction
            # (SQLite): the next request would see rows that do not exist.
            _roll_back(self.orm)
            raise
        finally:
            self.is_prepared = False
            if is_alone:
                self.orm.twophase = True
            try:
                if end.close:
                    self.orm.close()
                    self.orm.info["scope"] = None
                    forget(self.orm)
            finally:
                self.lock.release(closed=end.close)

    @property
    def _has_one_connection(self) -> bool:
        return len(self.companion.open_connections) == 1


def _roll_back(session: Session) -> None:
    try:
        session.rollback()
    except Exception:
        # SQLAlchemy has thrown a dead connection away, so the server rolls back by itself.
        if session.in_transaction():
            session.invalidate()


def _remember_connection(
    session: Any, transaction: SessionTransaction, connection: Connection
) -> None:
    companion: Companion = session._companion
    if not transaction.nested and session.in_nested_transaction():
        begin_before_savepoint(connection)
    if connection.engine is not session.bind:  # one of `binds`, or of `bind_arguments`
        watch(connection.engine)
    companion.connections = (*companion.open_connections, connection)
    companion.reads.put_off_begin(session, connection)


def _begin_now(session: Any, *_: object) -> None:
    # A listener of the mapper may write below SQLAlchemy.
    for connection in session._companion.open_connections:
        begin_now(connection)


def _refuse_if_aborted(session: Any) -> None:
    if failed_transactions:
        refuse_if_aborted(session._companion.connections)


def _record_commit(session: Any) -> None:
    for follower in tuple(session._companion.followers):
        if not session.in_nested_transaction():  # SQLAlchemy tells of savepoints too
            follower.record_commit(session)


def _record_rollback(session: Any, transaction: SessionTransaction) -> None:
    for follower in tuple(session._companion.followers):
        follower.record_rollback(transaction)


GuardedSession.transaction_class = LockedTransaction
event.listen(GuardedSession, "after_begin", _remember_connection)
event.listen(GuardedSession, "before_flush", _begin_now)
event.listen(GuardedSession, "before_commit", _refuse_if_aborted)
event.listen(GuardedSession, "after_commit", _record_commit)
event.listen(GuardedSession, "after_soft_rollback", _record_rollback)
