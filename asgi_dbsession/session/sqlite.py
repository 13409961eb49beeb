"""Knows if a transaction is open on a connection to SQLite that a session uses."""

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.orm import SessionTransaction

# Attributes of a connection that a session uses: whether a transaction was open before the last
# statement, and whether an error made SQLite roll back the transaction. In that case COMMIT will be
# refused, so later statements must be in a transaction too, although the application may have
# switched the driver to autocommit (to send BEGIN in a listener). A weak dictionary would not do:
# Python ignores an exception of a signal handler in the callback that removes an entry.
WAS_OPEN, ROLLED_BACK = "asgi_dbsession_was_open", "asgi_dbsession_rolled_back"


def begin_for_session(transaction: SessionTransaction, connection: Connection) -> None:
    """Called when a session gets a connection: BEGIN will be sent before its first write."""
    if connection.dialect.name == "sqlite" and not transaction.nested:
        vars(connection).update({WAS_OPEN: False, ROLLED_BACK: False})


def was_rolled_back(connection: Connection) -> bool:
    """Called after an error: return True if it made SQLite roll back the whole transaction.

    This happens at `INSERT OR ROLLBACK`, at `RAISE(ROLLBACK)` in a trigger, and at some errors of
    the disk. SQLite then answers the next statements as if nothing had happened. Source:
    https://www.sqlite.org/lang_transaction.html
    """
    if not vars(connection).get(WAS_OPEN) or is_open(connection):
        return False
    vars(connection)[ROLLED_BACK] = True
    return True


def is_open(connection: Connection) -> bool:
    """Return True if a transaction is open on the driver's connection."""
    driver: Any = connection.connection.driver_connection
    return bool(driver.in_transaction)
