"""Commits or rolls back sessions that have only read, which sends nothing and cannot block."""

from itertools import chain
from math import inf
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine import Transaction
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import QueuePool

from ._sqlalchemy import connections_of, has_changes, pool_of
from .companion import Companion
from .guard import GuardedSession
from .reads import has_foreign, has_only_read


def end_at_once(session: Session, companion: Companion, *, commit: bool) -> bool:
    """Commit or roll back a session that has only read, if no transaction began on the server.

    This sends nothing to the database. So this function needs no greenlet or thread, and does only
    those steps of SQLAlchemy's `commit()` and `rollback()` that a session without changes needs.
    The caller must hold the mutex of the lock, and no operation may be running.

    Returns:
        True if the session was committed or rolled back. False if SQLAlchemy's `commit()` or
        `rollback()` is needed; see `transactions_to_end`.
    """
    transactions = transactions_to_end(session, companion, commit=commit)
    if not transactions:
        return False
    outermost: Any = session.get_transaction()
    events: Any = session.dispatch
    if commit:
        for each in transactions:
            each.commit()
        events.after_commit(session)
    # This rolls back what was not committed.
    SessionTransaction.close(outermost)
    if not commit:
        Session.expire_all(session)
        events.after_soft_rollback(session, outermost)
    return True


def transactions_to_end(
    session: Session, companion: Companion, *, commit: bool
) -> tuple[Transaction, ...]:
    """Return the transactions that `end_at_once` can commit or roll back now, one per connection.

    The result is empty if SQLAlchemy's `commit()` or `rollback()` is needed: there may be changes,
    or these methods may call code of the application.
    """
    if not companion.expects_read or session.expire_on_commit:
        return ()
    transaction = session.get_transaction()
    # After a failed flush the transaction is inactive. If `must_fail` is True, COMMIT must raise an
    # error, because a write was refused or work was discarded. In both cases, the caller must use
    # SQLAlchemy's `commit()`, which raises the error.
    if transaction is None or not transaction.is_active or companion.must_fail:
        return ()
    connections = connections_of(transaction)
    # If the transaction has no connections, nothing shows that it has only read.
    if not connections or session.in_nested_transaction() or has_changes(session):
        return ()
    found: list[Transaction] = []
    for connection, begun in connections.items():
        # The application itself has begun or ended the transaction on this connection. SQLAlchemy's
        # `commit()` knows this case.
        if connection.get_transaction() is not begun or begun is None:
            return ()
        if not _sends_nothing(session, connection, commit):
            return ()
        found.append(begun)
    return tuple(found)


def _sends_nothing(session: Session, connection: Connection, commit: bool) -> bool:
    if not has_only_read(connection):
        return False
    dialect = connection.dialect
    # At a commit, all async drivers except asyncpg wait for a lock of their own, even if they send
    # nothing. This function cannot wait. So return False: then the session is committed with
    # SQLAlchemy's `commit()` in a greenlet, which can wait.
    if dialect.is_async and dialect.driver != "asyncpg":
        return False
    # A full pool closes the connection instead of taking it back, and has to wait for this close.
    # This function cannot wait. So return False, and let `commit()` run in a greenlet or thread.
    pool = pool_of(connection)
    if not isinstance(pool, QueuePool) or pool.checkedin() >= (pool.size() or inf):
        return False
    # A method or listener of the application may wait too.
    events: Any = session.dispatch
    of_connection: Any = connection.dispatch
    if commit:
        method, own = session.commit, GuardedSession.commit
        listeners = chain(events.before_commit, events.after_commit, of_connection.commit)
    else:
        method, own = session.rollback, GuardedSession.rollback
        listeners = chain(events.after_rollback, events.after_soft_rollback, of_connection.rollback)
    if getattr(method, "__func__", None) is not own:
        return False
    return not has_foreign(
        chain(listeners, events.after_transaction_end, pool.dispatch.reset, pool.dispatch.checkin)
    )
