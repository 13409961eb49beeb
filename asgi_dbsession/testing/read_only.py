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
    """Let the database refuse writes of the one statement that the block executes.

    A nested transaction may write, so writes are refused only during this statement. MariaDB has no
    read-only savepoints.
    """
    if dialect.name == "sqlite":
        send(connection, "PRAGMA query_only = ON")
        try:
            yield
        finally:
            send(connection, "PRAGMA query_only = OFF")
        return
    if dialect.name == "postgresql" and not transaction.read_only:
        # Send this once for each savepoint: PostgreSQL allows writes again at the end of the
        # savepoint.
        send(connection, "SET TRANSACTION READ ONLY")
        transaction.read_only = True
    yield
