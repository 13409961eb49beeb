"""Lets the database refuse the writes of read-only requests and `begin()` blocks in a test.

In production, a read-only request has a read-only transaction. In a test with `rolled_back` (which
undoes all work of the test), the request has only a savepoint in the one transaction of the test.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_dbsession.session.completion import run_to_completion

from .constraints import send
from .transaction import SavepointTransaction


@contextmanager
def refusing_writes(
    connection: PoolProxiedConnection, dialect: Dialect, transaction: SavepointTransaction
) -> Iterator[None]:
    """Let the database refuse writes during the one statement that the `with` block sends.

    In a test, each transaction of the application is a savepoint on one shared connection. Some of
    these transactions may write. So SQLite accepts writes again after the statement. PostgreSQL
    accepts writes again after the savepoint of the read-only transaction. MariaDB has no read-only
    savepoints, so it refuses no writes in a test.
    """
    if dialect.name == "sqlite":
        try:
            send(connection, "PRAGMA query_only = ON")
            yield
        finally:
            _allow_writes(connection, dialect)
        return
    if dialect.name == "postgresql" and not transaction.read_only:
        # In each savepoint, send SET TRANSACTION READ ONLY only once. PostgreSQL then refuses
        # writes until the savepoint ends.
        send(connection, "SET TRANSACTION READ ONLY")
        transaction.read_only = True
    yield


def _allow_writes(connection: PoolProxiedConnection, dialect: Dialect) -> None:
    """Let SQLite accept writes again, even if the task is cancelled."""
    statement = "PRAGMA query_only = OFF"
    if dialect.is_async:
        await_only(run_to_completion(greenlet_spawn(send, connection, statement)))
    else:
        send(connection, statement)
