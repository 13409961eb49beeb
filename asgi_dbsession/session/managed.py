"""A session that a unit of work opened; all of its work is committed or rolled back together."""

from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction

from ._sqlalchemy import flush_for_commit, forget
from .at_once import ends_at_once
from .companion import Companion
from .completion import call_here
from .failures import failed_transactions, refuse_if_aborted, watch
from .guard import GuardedSession
from .lock import End, SessionLock
from .reads import begin_before_savepoint, begin_now
from .roll_back import roll_back
from .transaction import LockedTransaction
from .two_phases import is_refused, names_of, prepare

S = TypeVar("S")


class ManagedSession(Generic[S]):
    """A session together with the data that its unit of work needs to commit or roll back.

    Args:
        session: The session that the application uses, made by a class from `guarded_class`.
        orm: The `sqlalchemy.orm.Session` inside of an `AsyncSession`; otherwise `session` itself.
        companion: The data of this package to attach to the session.
        run: A function that calls a blocking function, in a greenlet (async) or a thread (sync).

    Attributes:
        is_flushed: True after the method `flush`, which acquires the lock; `end` releases the lock.
        in_doubt: The names of two-phase transactions that may be prepared on the server.
    """

    is_flushed: bool = False
    in_doubt: str = ""

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
        """True if the session has work to commit or roll back, or if an operation runs."""
        # `in_transaction()` is True after a flush or a statement. The checks of `identity_map` and
        # `new` find objects that another task changed or added during an earlier COMMIT. A refused
        # write counts as work: the unit of work must fail even if the application caught the error.
        session, lock = self.orm, self.lock
        if session.in_transaction() or session.identity_map.check_modified() or lock.is_busy:
            return True
        return (lock.is_used and bool(session.new)) or self.companion.writes.refused is not None

    @property
    def ends_at_once(self) -> bool:
        """True if commit and rollback cannot block now, so that `end` needs no worker thread."""
        if self.session is not self.orm or self.run is call_here:  # `end` never needs a thread then
            return False
        return ends_at_once(self.orm, self.companion)

    def close_if_idle(self) -> bool:
        """Close the session permanently if it has no work; send nothing to the database.

        Returns:
            True if the session was closed. False if the session has work, so that the caller must
            call `end`.
        """
        with self.lock.mutex:
            if self.has_work or type(self.orm).close is not GuardedSession.close:
                return False
            self.lock.is_closed = True
        if list(self.orm):
            self.orm.expunge_all()
        return True

    def flush(self, end: End) -> None:
        """Flush, and do all other steps that can fail before PREPARE or COMMIT.

        The caller must call `end` afterwards.

        Raises:
            TransactionAborted: The application caught an error that aborted the transaction.
            Exception: The exception of the flush. Everything was rolled back.
        """
        self.lock.acquire_for_end(end)
        try:
            if self.companion.two_phases is not None:
                # Begin the transaction: the session of transaction number 1 may have no work, but
                # must be prepared too.
                self.orm.connection()
            flush_for_commit(self.orm, prepare=self.companion.two_phases is None)
            refuse_if_aborted(self.companion.open_connections)
        except BaseException:
            try:
                roll_back(self.orm)
            finally:
                self.lock.release()
            raise
        self.is_flushed = True

    def prepare(self) -> None:
        """Send PREPARE for the flushed session; afterwards the caller must call the method `end`.

        Raises:
            TransactionAborted: The application caught an error that aborted the transaction.
            Exception: The exception of PREPARE. The caller must call `end` in this case too.
        """
        connections = self.companion.open_connections
        self.in_doubt = names_of(connections)
        try:
            for connection in connections:
                prepare(connection)
        except BaseException as error:
            if is_refused(error) and len(connections) == 1:
                self.in_doubt = ""
            raise

    def end(self, end: End, commit: bool) -> None:
        """Wait until the running operation has ended; then commit or roll back the session.

        When this method returns or raises, the connection is back in its pool or closed.

        Args:
            end: The commit or rollback of the unit of work.
            commit: True to commit, False to roll back (because another database failed, for
                example).

        Raises:
            TransactionAborted: The application caught an error that aborted the transaction.
            Exception: The exception of the flush or of COMMIT. Everything was rolled back.
        """
        if not self.is_flushed:
            self.lock.acquire_for_end(end)
        try:
            if commit:
                self.orm.commit()
                self.in_doubt = ""
            else:
                self._roll_back()
                self.companion.writes.rolled_back(end.reason)
        except BaseException:
            if self.in_doubt:
                # The error may come from a listener after a successful COMMIT. So ask the
                # connections again which transactions are still prepared.
                self.in_doubt = names_of(self.companion.open_connections)
            # Close the connection of a prepared transaction without ROLLBACK, because another
            # session may have committed already.
            if self.in_doubt:
                self.orm.invalidate()
            else:
                # Roll back first. With SQLite, `close()` alone would give the pool a connection
                # with an open transaction, and the next request would see its uncommitted rows.
                roll_back(self.orm)
            raise
        finally:
            self._release(end)

    def leave_in_doubt(self, end: End) -> None:
        """Close the connection; an operator must end its prepared transaction on the server."""
        try:
            self.orm.invalidate()
        finally:
            self._release(end)

    def _roll_back(self) -> None:
        is_lost = any(each.invalidated for each in self.companion.open_connections)
        if roll_back(self.orm) and not is_lost:
            self.in_doubt = ""

    def _release(self, end: End) -> None:
        self.is_flushed = False
        try:
            if end.close:
                self.orm.close()
                self.orm.info["scope"] = None
                self.companion.two_phases = None
                forget(self.orm)
        finally:
            self.lock.release(closed=end.close)


def _remember_connection(
    session: Any, transaction: SessionTransaction, connection: Connection
) -> None:
    companion: Companion = session._companion
    if not transaction.nested and session.in_nested_transaction():
        begin_before_savepoint(connection)
    # An engine from `binds` or `bind_arguments` may not have the listeners of this package yet.
    if connection.engine is not session.bind:
        watch(connection.engine)
    companion.add_connection(connection)
    if companion.writes.forbidden:
        is_shared = companion.reads.is_shared
        companion.writes.begin(connection, in_savepoint=transaction.nested, is_shared=is_shared)
    if companion.expects_read:
        companion.reads.delay_begin(session, connection)


def _refuse_or_begin(session: Any, *_: object) -> None:
    session._companion.writes.check_flush(session)
    # Begin the transaction now, even if the session has only read. A mapper listener may write on
    # the driver's own connection, which this package cannot see; a rollback must include the write.
    for connection in session._companion.open_connections:
        begin_now(connection)


def _refuse_to_commit(session: Any) -> None:
    session._companion.writes.check_commit()
    if failed_transactions:
        refuse_if_aborted(session._companion.connections)


def _record_commit(session: Any) -> None:
    for follower in tuple(session._companion.followers):
        # SQLAlchemy calls this listener also at the release of a savepoint, which commits nothing.
        if not session.in_nested_transaction():
            follower.record_commit(session)


def _record_rollback(session: Any, transaction: SessionTransaction) -> None:
    for follower in tuple(session._companion.followers):
        follower.record_rollback(transaction)


GuardedSession.transaction_class = LockedTransaction
event.listen(GuardedSession, "after_begin", _remember_connection)
event.listen(GuardedSession, "before_flush", _refuse_or_begin)
event.listen(GuardedSession, "before_commit", _refuse_to_commit)
event.listen(GuardedSession, "after_commit", _record_commit)
event.listen(GuardedSession, "after_soft_rollback", _record_rollback)
