"""Stores which connections have only read so far, and sends BEGIN on them when needed."""

from collections.abc import Callable
from typing import Any
from weakref import ref

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from ._sqlalchemy import connections_of, isolation_level_on_connect
from .roll_back import has_changes
from .savepoints import with_outer
from .sqlite import has_open_work

# The drivers of PostgreSQL that can switch autocommit on and off without a round trip to the
# server. Only with these drivers, BEGIN is delayed until a statement may write.
DRIVERS = ("asyncpg", "psycopg")
# The drivers of MariaDB and MySQL with which it can be delayed, if the application asks for it.
ON_DEMAND = ("asyncmy", "aiomysql", "pymysql")
# The connections in autocommit mode whose BEGIN is delayed. The value is a function that switches
# autocommit off. Its second argument is True if SQLAlchemy is executing a statement, and handles
# all errors. (Weak references in a dictionary are faster than a `WeakKeyDictionary`.)
delayed: dict[ref[Connection], Callable[[Connection, bool], None]] = {}


class Reads:
    """Decides if sessions read without BEGIN and COMMIT. In this base class they never do.

    Attributes:
        is_shared: True inside `testing.rolled_back()`, where all sessions share one transaction.
        connect: A function that opens the connections of sessions. None: SQLAlchemy opens them.
    """

    is_shared: bool = False
    connect: Callable[[Any, Engine], Connection] | None = None

    def watch(self, engine: Engine) -> None:
        """Called with each new engine of the database."""

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


def may_have_written(session: Session) -> bool:
    """Return True unless it is certain that a session has no changes and no uncommitted writes."""
    transaction = session.get_transaction()
    if transaction is None or has_changes(session):
        return has_changes(session)
    # If the transaction or a savepoint is inactive, a flush has failed, and has discarded the
    # changed objects. So the session had work, although no changed object is left.
    opened = with_outer(session.get_nested_transaction() or transaction)
    if not all(each.is_active for each in opened):
        return True
    return not all(map(has_only_read, connections_of(transaction)))


def begin_now(connection: Connection, *, in_statement: bool = False) -> None:
    """If BEGIN was delayed, switch autocommit off: a transaction begins with the next statement."""
    begin = delayed.get(ref(connection))
    if begin is not None:
        begin(connection, in_statement)
        delayed.pop(ref(connection), None)


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
