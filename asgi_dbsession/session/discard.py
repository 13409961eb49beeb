"""Closes connections on which a transaction may still be open, so that no pool reuses them."""

from contextlib import suppress

from sqlalchemy import Connection
from sqlalchemy.util import await_only, greenlet_spawn

from .completion import run_to_completion


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


def discard(connection: Connection) -> None:
    """Close a connection on which a transaction may still be open. The pool does not reuse it.

    The close is completed even if the task is cancelled meanwhile.
    """
    if connection.dialect.is_async:
        await_only(run_to_completion(greenlet_spawn(_throw_away, connection)))
    else:
        _throw_away(connection)


def _throw_away(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        # On SQLite, send ROLLBACK before the connection is closed. Otherwise SQLite keeps the locks
        # of the connection until Python frees the cursors of the connection. Ignore an error of the
        # ROLLBACK. It must not hide the earlier error, which is the reason for closing the
        # connection.
        with suppress(Exception):
            connection.dialect.do_rollback(connection.connection)
    connection.invalidate()
