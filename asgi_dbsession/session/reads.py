"""Stores the connections on which BEGIN is delayed, and ends the delay before a write."""

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from ._sqlalchemy import connections_of, has_changes, isolation_level_on_connect
from .roll_back import with_outer
from .sqlite import has_open_work

# The drivers of PostgreSQL with which BEGIN is delayed until a statement may write. They can switch
# autocommit on and off without a round trip to the server. So the delay costs nothing.
DRIVERS = ("asyncpg", "psycopg")
# The drivers of MariaDB and MySQL that support `autocommit_reads=True`. With this option, sessions
# read in autocommit mode, without BEGIN and COMMIT. The option is off by default, because these
# drivers need a round trip to the server to switch autocommit on or off.
ON_DEMAND = ("asyncmy", "aiomysql", "pymysql")
# The listeners (for SQLAlchemy's events) in these modules send no statements and wait for nothing.
# So if a session has only read, this package commits it without an `await` despite these listeners.
# With any other listener, this package calls SQLAlchemy's `commit()`, where the listener can wait.
_HARMLESS = ("asgi_dbsession.", "opentelemetry.")
# For each connection on which BEGIN is delayed: the function that switches autocommit off. Weak
# references in a plain dictionary are faster than a `WeakKeyDictionary`.
delayed: dict[ref[Connection], Callable[[Connection, bool], None]] = {}


class Reads:
    """Decides if sessions read in autocommit mode, without BEGIN and COMMIT.

    This base class never allows autocommit mode. Subclasses for PostgreSQL, MariaDB and MySQL do.

    Attributes:
        is_shared: True inside `testing.rolled_back()`, where all sessions share one transaction.
        connect: A function that opens a connection for a session. If None, SQLAlchemy does.
    """

    is_shared: bool = False
    connect: Callable[[Any, Engine], Connection] | None = None

    def watch(self, engine: Engine) -> None:
        """Called with each engine that the database builds. A subclass can add listeners to it."""

    def delay_begin(self, session: Session, connection: Connection) -> None:
        """Called when a session begins a transaction on a connection and probably only reads next.

        A subclass can then delay BEGIN on the server until the session writes.
        """


def has_foreign(listeners: Iterable[object]) -> bool:
    """Return True if one of the listeners belongs neither to this package nor to OpenTelemetry.

    Such a listener may send statements, or wait for something.
    """
    modules = (str(getattr(each, "__module__", "")) for each in listeners)
    return not all(module.startswith(_HARMLESS) for module in modules)


def isolation_level(connection: Connection) -> str | None:
    """Return the isolation level for transactions on a connection. None if the level is unknown.

    The level comes from SQLAlchemy's option `isolation_level`. If the application has not set this
    option, the level is the default level of the server. A level that the application has set by
    SQL text is not seen.
    """
    level: str | None = connection.get_execution_options().get("isolation_level")
    default = connection.dialect.default_isolation_level
    return level or isolation_level_on_connect(connection) or default


def has_only_read(connection: Connection) -> bool:
    """Return True if it is certain that the transaction on the connection has no writes."""
    # After the connection was lost, nobody knows if its transaction had writes: return False.
    if connection.invalidated:
        return False
    if ref(connection) in delayed:
        return True
    is_sqlite = connection.dialect.name == "sqlite"
    return is_sqlite and not connection.closed and not has_open_work(connection)


def may_have_written(session: Session) -> bool:
    """Return True if a session may have uncommitted work: changed objects or writes.

    Return False only if it is certain that the session has neither of them.
    """
    transaction = session.get_transaction()
    if transaction is None or has_changes(session):
        return has_changes(session)
    # After a failed flush, no changed object is left, but SQLAlchemy has marked the transaction or
    # savepoint as inactive. So the session had work.
    opened = with_outer(session.get_nested_transaction() or transaction)
    if not all(each.is_active for each in opened):
        return True
    return not all(map(has_only_read, connections_of(transaction)))


def begin_now(connection: Connection, *, in_statement: bool = False) -> None:
    """Switch autocommit off, if a connection has read in autocommit mode, without BEGIN, so far.

    Call this function before a write. In autocommit mode, a rollback could not undo the write.

    Args:
        connection: A connection of a session.
        in_statement: True if SQLAlchemy is executing a statement, and so handles errors of the
            driver. False if this function must handle these errors.
    """
    begin = delayed.get(ref(connection))
    if begin is not None:
        begin(connection, in_statement)
        delayed.pop(ref(connection), None)


def begin_on_server(connection: Connection) -> None:
    """Send BEGIN to the server now if the driver of a connection is asyncpg.

    With asyncpg, SQLAlchemy sends BEGIN only before the next statement that SQLAlchemy itself
    sends. But the application may use asyncpg's own connection next (for COPY, for example). What
    it writes there must be in the transaction too.
    """
    is_asyncpg = connection.dialect.driver == "asyncpg"
    if is_asyncpg and connection.in_transaction() and not is_in_transaction(connection):
        cursor = connection.connection.cursor()
        cursor.execute("")
        cursor.close()


def is_in_transaction(connection: Connection) -> bool:
    """Ask the driver (asyncpg or psycopg) if a transaction is open on a connection.

    SQLAlchemy does not know all transactions: the application may have sent BEGIN on the driver's
    own connection.
    """
    driver: Any = connection.connection.driver_connection
    if connection.dialect.driver == "asyncpg":
        return bool(driver.is_in_transaction())
    # psycopg uses PostgreSQL's library libpq. There, the status 0 (PQTRANS_IDLE) means that no
    # transaction is open.
    return bool(driver.info.transaction_status != 0)
