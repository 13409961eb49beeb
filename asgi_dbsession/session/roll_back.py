"""Rolls back a session or a connection. A connection in an unknown state is closed instead."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only, greenlet_spawn

from ._sqlalchemy import has_changes
from .completion import run_before_cancellation


def roll_back(session: Session) -> bool:
    """Roll back the session. Return True if the server has confirmed the rollback."""
    try:
        if not session.in_transaction() and has_changes(session):
            # Begin a transaction, because SQLAlchemy's `rollback()` does nothing without one. The
            # session has changes that another task made while a COMMIT was running. If they were
            # not rolled back, the next COMMIT would store them.
            session.begin()
        session.rollback()
    except Exception:
        # The connection was lost. The server then rolls back the transaction by itself, unless the
        # transaction is prepared for a two-phase commit.
        if session.in_transaction():
            session.invalidate()
        return False
    return True


def with_outer(transaction: SessionTransaction | None) -> Iterator[SessionTransaction]:
    """Yield a savepoint, the savepoint around it, and so on, up to the transaction itself."""
    while transaction is not None:
        yield transaction
        transaction = transaction.parent


def roll_back_or_discard(connection: Connection) -> None:
    """Send ROLLBACK. If the ROLLBACK fails or is cancelled, close the connection.

    After a failure or a cancellation, it is unknown if the ROLLBACK has reached the server. So a
    transaction may still be open, and the pool must not give the connection to another session.

    Raises:
        BaseException: The error of the ROLLBACK, or the cancellation.
    """
    try:
        connection.dialect.do_rollback(connection.connection)
    except BaseException:
        discard(connection)
        raise


def discard(connection: Connection, cursor: Any = None) -> None:
    """Close a connection on which a transaction may still be open. The pool does not reuse it.

    The close is completed even if the task is cancelled meanwhile.

    Args:
        connection: The connection.
        cursor: The cursor of the statement that was interrupted, if there was one.
    """
    if connection.dialect.is_async:
        await_only(run_before_cancellation(greenlet_spawn(_throw_away, connection, cursor)))
    else:
        _throw_away(connection, cursor)


def _throw_away(connection: Connection, cursor: Any) -> None:
    if connection.dialect.name == "sqlite":
        # SQLite keeps the locks of a closed connection until Python frees the cursors. So close the
        # cursor and send ROLLBACK first. An error here must not hide the earlier error.
        with suppress(Exception):
            if cursor is not None:
                cursor.close()
            connection.dialect.do_rollback(connection.connection)
    connection.invalidate()
