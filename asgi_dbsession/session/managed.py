"""A session of a unit of work (a request or a `begin()` block), with its commit and rollback."""

from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeAlias, TypeVar

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction

from ._sqlalchemy import flush_for_commit, forget, has_changes
from .at_once import end_at_once, transactions_to_end
from .companion import Companion
from .end import End
from .failures import is_watched_first, refuse_if_aborted, watch
from .guard import GuardedSession
from .lock import SessionLock
from .reads import begin_now
from .roll_back import roll_back, with_outer
from .sqlite import begin_for_session

S = TypeVar("S")


class ManagedSession(Generic[S]):
    """A session with the data that is needed to commit it or roll it back.

    Args:
        orm: The `sqlalchemy.orm.Session` inside an `AsyncSession`, or the sync session itself.
        run: A function that calls blocking code, in a greenlet (async) or in a thread (sync).

    Attributes:
        is_flushed: True after `flush`, until `end` commits or rolls back. Meanwhile the commit
            holds the session's lock, so that no task can use the session.
    """

    is_flushed: bool = False

    def __init__(
        self, session: S, orm: Session, companion: Companion, run: Callable[..., Awaitable[Any]]
    ) -> None:
        self.session: S = session
        self.orm: Session = orm
        self.companion: Companion = companion
        self.lock: SessionLock = companion.lock
        self.run: Callable[..., Awaitable[Any]] = run
        vars(orm)["_companion"] = companion

    @property
    def has_work(self) -> bool:
        """True if the session has anything to commit or roll back, or if an operation runs."""
        if self.orm.in_transaction() or has_changes(self.orm):
            return True
        # Return True also after a refused write or an early `close()`, so that `commit()` is called
        # and raises an error. The application may have caught the error of the refused write. The
        # client would then get a success status, although the write is missing.
        return self.lock.is_busy or self.companion.must_fail

    def ends_at_once(self, *, commit: bool) -> bool:
        """Return True if a commit or rollback sends nothing to the database and needs no `await`.

        This is so if the session has only read, without BEGIN.
        """
        if self.lock.is_busy:
            return False
        return bool(transactions_to_end(self.orm, self.companion, commit=commit))

    def end_at_once(self, *, commit: bool, close: bool = False) -> bool:
        """Commit or roll back without an `await`, if the session has only read, without BEGIN.

        Nothing is sent to the database.

        Args:
            commit: True to commit, False to roll back.
            close: True to close the session permanently after the commit or rollback.

        Returns:
            True on success. False if the caller must call the method `end` of this session instead.
        """
        with self.lock.mutex:
            if self.lock.is_busy or not end_at_once(self.orm, self.companion, commit=commit):
                return False
            self.lock.forget_users()
        return not close or self.close_if_idle()

    def close_if_idle(self) -> bool:
        """Close the session permanently if it has nothing to commit. Send nothing to the database.

        Returns:
            True if the session was closed. False if the session has work, which the caller must
            commit or roll back with `end`.
        """
        with self.lock.mutex:
            if self.has_work or type(self.orm).close is not GuardedSession.close:
                return False
            self.lock.close()
        if list(self.orm):
            Session.expunge_all(self.orm)
        self._let_go()
        return True

    def flush(self, end: End) -> None:
        """Send all changes to the database, and do all other steps that can fail before COMMIT.

        If this method succeeds, the caller must call the method `end`, which commits or rolls back.

        Raises:
            TransactionAborted: The application caught an error that aborted the transaction.
            Exception: The error of the flush. The work of the session was rolled back.
        """
        self.lock.acquire_for_end(end)
        try:
            self._flush()
        except BaseException:
            try:
                roll_back(self.orm)
            finally:
                self.lock.release()
            raise
        self.is_flushed = True

    def _flush(self) -> None:
        flush_for_commit(self.orm)
        # Check for an aborted transaction after the flush too: during the flush, a listener of the
        # application may have caught the error of a failed statement.
        refuse_if_aborted(self.companion.open_connections)

    def end(self, end: End, commit: bool) -> None:
        """Commit or roll back the session. If an operation of the session runs, wait for it first.

        Even after an error, the connection is in its pool again or closed.

        Raises:
            Exception: The flush or COMMIT failed, and the work was rolled back.
        """
        if not self.is_flushed:
            self.lock.acquire_for_end(end)
        try:
            # Read the argument `commit`, not `end.commit` (what the request wants). If the flush or
            # COMMIT of one database has failed, the sessions of the other databases are rolled
            # back, even if the request wants a commit.
            if commit:
                self.orm.commit()
            else:
                roll_back(self.orm)
                self.companion.rolled_back(end.reason)
        except BaseException:
            # Send ROLLBACK before `close()`. With SQLite, `close()` alone would give the pool a
            # connection with an open transaction, and the next request would see the uncommitted
            # rows.
            roll_back(self.orm)
            raise
        finally:
            self._release(end)

    def _let_go(self) -> None:
        # A task may still refer to this session. Remove the ASGI scope from the session. Otherwise
        # the session would keep the data of the request in memory.
        self.orm.info["scope"] = None
        self.companion.connect = None
        forget(self.orm)

    def _release(self, end: End) -> None:
        self.is_flushed = False
        try:
            # If the session has new objects now, a listener has added them after the flush. They
            # are not a part of this COMMIT, and the next COMMIT stores them.
            self.lock.has_finished_work = bool(self.orm.new)
            if end.close:
                self.orm.close()
                self._let_go()
        finally:
            self.lock.release(closed=end.close)


Sessions: TypeAlias = list[ManagedSession[Any]]


def _set_up_connection(
    session: Any, transaction: SessionTransaction, connection: Connection
) -> None:
    companion: Companion = session._companion
    begin_for_session(transaction, connection)
    # Add this package's listener for errors to each further engine of the session (SQLAlchemy's
    # option `binds`). If a listener of the application now comes before it, put this package's
    # listener first again. The application's listener may replace an error, and so hide it.
    if connection.engine is not session.bind or not is_watched_first(connection):
        watch(connection.engine)
    companion.add_connection(connection)
    if companion.recording is not None and not transaction.nested:
        companion.recording.connected(session.bind, connection)
    if companion.read_only is not None:
        is_shared = companion.reads.is_shared
        companion.read_only.begin(connection, in_savepoint=transaction.nested, is_shared=is_shared)
    if companion.expects_read:
        companion.reads.delay_begin(session, connection)


def _refuse_or_begin(session: Any, *_: object) -> None:
    companion: Companion = session._companion
    if companion.read_only is not None:
        companion.read_only.check_flush(session)
    # Send BEGIN now, because a listener of the application may write on the driver's own connection
    # during the flush. This package cannot see such a write, but a rollback must undo it.
    for connection in companion.open_connections:
        begin_now(connection)


def _refuse_to_commit(session: Any) -> None:
    # SQLAlchemy calls this listener before COMMIT and before RELEASE SAVEPOINT. Before RELEASE
    # SAVEPOINT, ignore statements that have failed inside the savepoint. The database itself then
    # refuses the RELEASE SAVEPOINT.
    of_savepoint = session.in_nested_transaction()
    session._companion.check_commit()
    refuse_if_aborted(session._companion.connections, of_savepoint=of_savepoint)


def _record_commit(session: Any) -> None:
    # SQLAlchemy calls this listener after a COMMIT, and also after the release of a savepoint. The
    # release commits nothing, so nothing is recorded then.
    if not session.in_nested_transaction():
        # An earlier `close()` may have discarded work. If the application then calls `commit()`
        # itself, it accepts this. So the unit of work need not fail any more.
        session._companion.discarded = None
        for follower in tuple(session._companion.followers):
            follower.record_commit(session)


def _record_rollback(session: Any, transaction: SessionTransaction) -> None:
    # After a failed flush, `transaction` is an internal object of SQLAlchemy. Record the rollback
    # of the savepoint or transaction around the flush instead.
    around = with_outer(transaction)
    rolled_back = next(each for each in around if each.nested or each.parent is None)
    for follower in tuple(session._companion.followers):
        follower.record_rollback(rolled_back)


event.listen(GuardedSession, "after_begin", _set_up_connection)
event.listen(GuardedSession, "before_flush", _refuse_or_begin)
event.listen(GuardedSession, "before_commit", _refuse_to_commit)
event.listen(GuardedSession, "after_commit", _record_commit)
event.listen(GuardedSession, "after_soft_rollback", _record_rollback)
