"""Finds out if the transaction of a connection may only read; see `optional/read_only/`."""

from sqlalchemy import Connection

ON_MARIADB, ON_POSTGRESQL = "START TRANSACTION READ ONLY", "SET TRANSACTION READ ONLY"
# These statements make a transaction read-only. Reports do not count them as statements of the
# application.
PARTS_OF_BEGIN = frozenset((ON_MARIADB, ON_POSTGRESQL))
# `connection.info` has this key while a session that may only read uses the connection. The value
# is an object of the class `Refusals`, which refuses the writes of this session.
KEY = "asgi_dbsession.read_only"


def may_only_read(connection: Connection) -> bool:
    """Return True if the transaction is read-only. False if only a savepoint is read-only."""
    refusals = connection.info.get(KEY)
    return refusals is not None and bool(refusals.covers_transaction)
