"""Commits or rolls back sessions for which nothing must be sent to the database."""

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
    """Commit or roll back a session if nothing must be sent to the database.

    For example, the session has only read, without BEGIN. The caller must hold the mutex of the
    session's lock. Return False if nothing was done.
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
    # `close` gives the connections back to the pool. If nothing was committed, it rolls back first.
    SessionTransaction.close(outermost)
    if not commit:
        Session.expire_all(session)
        events.after_soft_rollback(session, outermost)
    return True


def transactions_to_end(
    session: Session, companion: Companion, *, commit: bool
) -> tuple[Transaction, ...]:
    """Return the transactions of a session, if their commit or rollback sends nothing to a server.

    There is one transaction for each connection. The result is empty if SQLAlchemy's `commit()` or
    `rollback()` is needed. For example, the session has changes, or the application has a listener
    that may wait for something.
    """
    if not companion.expects_read or session.expire_on_commit:
        return ()
    transaction = session.get_transaction()
    # After a failed flush (the transaction is not active then) or after lost work (`must_fail`),
    # the commit must raise an error. Only SQLAlchemy's `commit()` does this.
    if transaction is None or not transaction.is_active or companion.must_fail:
        return ()
    connections = connections_of(transaction)
    if not connections or session.in_nested_transaction() or has_changes(session):
        return ()
    found: list[Transaction] = []
    for connection, begun in connections.items():
        # If the application itself has begun or ended the transaction on this connection, leave the
        # session to SQLAlchemy's `commit()` or `rollback()`.
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
    # Return False for async drivers except asyncpg: their commit waits for a lock, even if nothing
    # is sent. This function cannot wait.
    if dialect.is_async and dialect.driver != "asyncpg":
        return False
    # A full pool closes the connection instead of taking it back, and has to wait for this close.
    # This function cannot wait. So return False, and let `commit()` run in a greenlet or thread.
    pool = pool_of(connection)
    if not isinstance(pool, QueuePool) or pool.checkedin() >= (pool.size() or inf):
        return False
    # The application may have its own `commit()` method or event listeners, and they may wait for
    # something. This function cannot wait. So return False if there is such a method or listener.
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
