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
    """Commit or roll back a session, but only if this sends nothing to the database.

    This is so if the session has only read, without BEGIN. Before the call, acquire the `mutex` of
    the `SessionLock` (the lock of the session), so that no other thread uses the session meanwhile.

    Returns:
        False if nothing was done, so the caller must call SQLAlchemy's `commit()` or `rollback()`.
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
    # Return an empty tuple if work was lost: a flush has failed, a write was refused, or `close()`
    # was called too early. Then the caller calls SQLAlchemy's `commit()`, which raises an error.
    # `end_at_once`, the short way of this module, would raise none.
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
    # Return False for async drivers except asyncpg, so that SQLAlchemy's `commit()` ends the
    # session in a greenlet. The commit of these drivers must be awaited, even if it sends nothing.
    # The caller of this function cannot await.
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
