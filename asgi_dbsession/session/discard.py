"""Closes connections of which nobody knows if a transaction is open on them."""

from contextlib import suppress

from sqlalchemy import Connection
from sqlalchemy.util import await_only, greenlet_spawn

from .completion import run_to_completion


def roll_back_or_discard(connection: Connection) -> None:
    """Send ROLLBACK. If it fails or is cancelled, it may not have arrived: close the connection."""
    try:
        connection.dialect.do_rollback(connection.connection)
    except BaseException:
        discard(connection)
        raise


def discard(connection: Connection) -> None:
    """Close a connection of unknown state, even if the task is cancelled meanwhile."""
    if connection.dialect.is_async:
        await_only(run_to_completion(greenlet_spawn(_throw_away, connection)))
    else:
        _throw_away(connection)


def _throw_away(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        # For SQLite, send ROLLBACK before the close. Otherwise SQLite keeps the locks of the
        # connection until Python frees its cursors. Ignore an error of this ROLLBACK: the caller
        # must see the earlier error, because of which the connection is closed.
        with suppress(Exception):
            connection.dialect.do_rollback(connection.connection)
    connection.invalidate()
