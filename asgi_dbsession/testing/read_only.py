"""Refuses writes in a transaction that may only read, inside of `rolled_back`."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import PoolProxiedConnection

from .constraints import send
from .transaction import SavepointTransaction


@contextmanager
def refusing_writes(
    connection: PoolProxiedConnection, dialect: Dialect, transaction: SavepointTransaction
) -> Iterator[None]:
    """Let the database refuse writes while the `with` block executes one statement.

    Writes are refused only during this statement, because a nested transaction on the same
    connection may write. On MariaDB writes are not refused, because it has no read-only savepoints.
    """
    if dialect.name == "sqlite":
        send(connection, "PRAGMA query_only = ON")
        try:
            yield
        finally:
            send(connection, "PRAGMA query_only = OFF")
        return
    if dialect.name == "postgresql" and not transaction.read_only:
        # Send this statement only once for each savepoint. At the end of the savepoint, PostgreSQL
        # allows writes again.
        send(connection, "SET TRANSACTION READ ONLY")
        transaction.read_only = True
    yield
