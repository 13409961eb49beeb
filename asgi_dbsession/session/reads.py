"""Stores which connections have only read so far, and sends BEGIN on them when needed."""

from typing import Any
from weakref import ref

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from ._sqlalchemy import connections_of, isolation_level_on_connect
from .savepoints import with_outer
from .sqlite import has_open_work

# The drivers of PostgreSQL that can switch autocommit on and off without a round trip to the
# server. Only with these drivers, BEGIN is delayed until a statement may write.
DRIVERS = ("asyncpg", "psycopg")
# The connections in autocommit mode whose BEGIN is delayed. (Weak references in a set are faster
# than a `WeakSet`.) In addition, `connection.info` of these connections has the key `KEY`. A
# listener finds this key when a connection returns to the pool, and switches autocommit off again.
delayed: set[ref[Connection]] = set()
KEY = "asgi_dbsession.delayed_begin"


class Reads:
    """Decides if sessions read without BEGIN and COMMIT. In this base class they never do.

    Attributes:
        is_shared: True inside `testing.rolled_back()`, where all sessions share one transaction.
    """

    is_shared: bool = False

    def delay_begin(self, session: Session, connection: Connection) -> None:
        """Called when SQLAlchemy begins a transaction. A subclass may delay BEGIN on the server."""


def isolation_level(connection: Connection) -> str | None:
    """Return the isolation level of transactions on the connection; None if it is unknown."""
    level: str | None = connection.get_execution_options().get("isolation_level")
    default = connection.dialect.default_isolation_level
    return level or isolation_level_on_connect(connection) or default


def has_only_read(connection: Connection) -> bool:
    """Return True if it is certain that the transaction on the connection has no writes."""
    # If the connection was lost, nobody knows any more if its transaction has written.
    if connection.invalidated:
        return False
    if connection.dialect.name == "sqlite" and not connection.closed:
        return not has_open_work(connection)
    return ref(connection) in delayed


def session_has_only_read(session: Session) -> bool:
    """Return True if it is certain that the transaction of a session has no writes."""
    transaction = session.get_transaction()
    if transaction is None:
        return True
    # If the transaction or a savepoint is inactive, a flush has failed, and has discarded the
    # changed objects. So the session had work, although no changed object is left.
    opened = with_outer(session.get_nested_transaction() or transaction)
    if not all(each.is_active for each in opened):
        return False
    return all(map(has_only_read, connections_of(transaction)))


def begin_now(connection: Connection) -> None:
    """If BEGIN was delayed, switch autocommit off: BEGIN is sent before the next statement."""
    if ref(connection) in delayed:
        set_autocommit(connection, False)
        connection.info.pop(KEY, None)
        delayed.discard(ref(connection))


def begin_on_server(connection: Connection) -> None:
    """Send BEGIN now if the driver is asyncpg: the application may use asyncpg's connection next.

    For example, the application may call COPY on asyncpg's own connection. SQLAlchemy would send
    BEGIN only before the next statement that SQLAlchemy itself sends.
    """
    if connection.dialect.driver == "asyncpg" and connection.in_transaction():
        driver: Any = connection.connection.driver_connection
        if not driver.is_in_transaction():
            cursor = connection.connection.cursor()
            cursor.execute("")
            cursor.close()


def is_in_transaction(connection: Connection) -> bool:
    """Return True if a transaction is open on the connection, according to its driver.

    SQLAlchemy may not know this transaction: the application may have sent BEGIN on the driver's
    own connection.
    """
    driver: Any = connection.connection.driver_connection
    if connection.dialect.driver == "asyncpg":
        return bool(driver.is_in_transaction())
    # The driver psycopg uses libpq. In libpq, 0 is PQTRANS_IDLE: no transaction is open.
    return bool(driver.info.transaction_status != 0)


def set_autocommit(connection: Connection, value: bool) -> None:
    """Switch autocommit of the driver's connection on or off."""
    driver: Any = connection.connection.dbapi_connection
    driver.autocommit = value
