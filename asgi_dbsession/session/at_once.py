"""Finds sessions whose commit sends nothing to the database and cannot block, and commits them."""

from collections.abc import Iterable
from math import inf
from typing import Any
from weakref import ref

from sqlalchemy import Connection
from sqlalchemy.engine import Transaction
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import QueuePool

from ._sqlalchemy import connections_of, pool_of
from .companion import Companion
from .guard import GuardedSession
from .reads import delayed, has_foreign, has_only_read
from .roll_back import has_changes

# SQLAlchemy calls the listeners of these events during a commit or rollback. If the application has
# added a listener, the commit may block the thread, and so needs a worker thread.
_OF_SESSIONS = (
    "after_commit",
    "after_rollback",
    "after_soft_rollback",
    "after_transaction_end",
    "before_commit",
)
_OF_CONNECTIONS = ("commit", "rollback")
_OF_POOLS = ("checkin", "reset")
_METHODS = ("close", "commit", "rollback")
_OWN_LISTENERS = 2


def ends_at_once(session: Session, companion: Companion) -> bool:
    """Return True if commit and rollback of a session cannot block the calling thread.

    The result is True if all of this holds: the session has only read, no transaction has begun on
    the server, and the application has neither overridden the session's methods nor added
    listeners, because such code may block.
    """
    if companion.lock.is_busy or has_changes(session):
        return False
    if any(getattr(type(session), each) is not getattr(GuardedSession, each) for each in _METHODS):
        return False
    listeners = _listeners(session, _OF_SESSIONS)
    return not has_foreign(listeners) and all(map(_sends_nothing, companion.open_connections))


def commit_at_once(session: Session, companion: Companion) -> bool:
    """Commit a session without a greenlet or thread, if it has only read, and has sent no BEGIN.

    Such a commit sends nothing to the database. So this function does only those steps of
    SQLAlchemy's `commit()` that a session without changes needs. The caller must hold the mutex of
    the lock, and no operation may be running.

    Returns:
        True if the session was committed. False if SQLAlchemy's `commit()` is needed: there may be
        changes, or the application has added listeners or overridden `commit()`.
    """
    transaction = session.get_transaction()
    # After a failed flush the transaction is inactive. The caller must then use SQLAlchemy's
    # `commit()`, which raises an error.
    if transaction is None or not transaction.is_active:
        return False
    # Commit here only if it is certain that each connection has only read. If the transaction has
    # no connections, nothing shows that it has only read. Then the caller must use `commit()`.
    connections = connections_of(transaction)
    if not connections or not all(map(_commits_at_once, connections, connections.values())):
        return False
    # If `must_fail` is True, COMMIT must raise an error, because a write was refused or work was
    # discarded. The objects in `followers` (functions given to `on_commit`, for example) must be
    # notified of the COMMIT. In both cases, the caller must use SQLAlchemy's `commit()`.
    if companion.must_fail or companion.followers:
        return False
    if not _has_only_transactions(session):
        return False
    for begun in connections.values():
        if begun is not None:
            begun.commit()
    SessionTransaction.close(transaction)
    return True


def _has_only_transactions(session: Session) -> bool:
    """Return True if a commit only ends transactions: no flush, and no call of application code."""
    if session.expire_on_commit or session.in_nested_transaction() or has_changes(session):
        return False
    if getattr(session.commit, "__func__", None) is not GuardedSession.commit:
        return False
    # This package has added one listener for `before_commit` and one for `after_commit`. If there
    # are more, the application has added one. Only SQLAlchemy's `commit()` calls that listener. So
    # return False.
    events: Any = session.dispatch
    listeners = len(events.before_commit) + len(events.after_commit)
    return listeners == _OWN_LISTENERS and not events.after_transaction_end


def _commits_at_once(connection: Connection, begun: Transaction | None) -> bool:
    if ref(connection) not in delayed or connection.closed or connection.invalidated:
        return False
    # If the application itself has begun or ended the transaction on this connection, return False:
    # then the session is committed with SQLAlchemy's `commit()`, which knows this case.
    if begun is None or connection.get_transaction() is not begun:
        return False
    dialect = connection.dialect
    # At a commit, all async drivers except asyncpg wait for a lock of their own, even if they send
    # nothing. This function cannot wait. So return False: then the session is committed with
    # SQLAlchemy's `commit()` in a greenlet, which can wait.
    if dialect.is_async and dialect.driver != "asyncpg":
        return False
    pool = pool_of(connection)
    # A full pool closes the connection instead of taking it back, and has to wait for this close.
    # This function cannot wait. So return False, and let `commit()` run in a greenlet or thread.
    if not isinstance(pool, QueuePool) or pool.checkedin() >= (pool.size() or inf):
        return False
    listeners = connection.dispatch.commit or pool.dispatch.reset
    return not (listeners or has_foreign(pool.dispatch.checkin))


def _sends_nothing(connection: Connection) -> bool:
    if has_foreign(_listeners(connection, _OF_CONNECTIONS)):
        return False
    if has_foreign(_listeners(connection.engine.pool, _OF_POOLS)):
        return False
    return has_only_read(connection)


def _listeners(target: Any, events: Iterable[str]) -> Iterable[Any]:
    return (each for name in events for each in getattr(target.dispatch, name))
