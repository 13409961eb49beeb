"""Delays BEGIN until a session sends a statement that may write."""

from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect, ExecutionContext, TwoPhaseTransaction
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from asgi_dbsession.errors import ConfigurationError

from ._sqlalchemy import is_flushing, isolation_level_on_connect
from .plain_reads import is_plain_read

# The connections that this module has switched to autocommit, and that have sent no BEGIN yet.
# `connection.info` of such a connection has the key `_KEY`. When the connection returns to the
# pool, the listener `_restore` finds this key and switches autocommit off again.
_delayed: WeakSet[Connection] = WeakSet()
_KEY = "asgi_dbsession.delayed_begin"

# The dialects whose engines have the listeners of this module. An engine and its copies with other
# options share one dialect, so that no listener is added twice.
_watched: WeakSet[Dialect] = WeakSet()

# The drivers that can switch autocommit on and off without a round trip to the server.
DRIVERS = ("asyncpg", "psycopg")


class Reads:
    """Decides if the sessions of a database read without BEGIN and COMMIT.

    At the isolation level READ COMMITTED, each statement sees its own snapshot of the data. So
    BEGIN and COMMIT around a SELECT only cost two round trips to the server. Source:
    https://www.postgresql.org/docs/current/transaction-iso.html

    Args:
        wanted: The option `autocommit_reads` of the database. True: read without BEGIN at every
            isolation level. None: read without BEGIN only at READ COMMITTED. False: always send
            BEGIN.
    """

    def __init__(self, wanted: bool | None) -> None:
        self._wanted = wanted
        # The helper `testing.rolled_back()` sets this attribute to True, because all sessions of
        # the test share one transaction.
        self.is_shared: bool = False

    def delay_begin(self, session: Session, connection: Connection) -> None:
        """Switch the connection to autocommit, until the session may write."""
        if self._wanted is False or self.is_shared or not self._can_delay(session, connection):
            return
        # Set `_KEY` before the switch to autocommit. If a signal handler raises an exception
        # between these two steps, the listener `_restore` still switches autocommit off.
        connection.info[_KEY] = True
        _delayed.add(connection)
        _set_autocommit(connection, True)

    def _can_delay(self, session: Session, connection: Connection) -> bool:
        dialect = connection.dialect
        if dialect not in _watched or connection.engine is not session.bind:
            return False
        if is_flushing(session) or is_in_transaction(connection):
            return False
        # A savepoint exists only inside a transaction that has begun already, so autocommit is not
        # possible.
        if connection.in_nested_transaction():
            return False
        if isinstance(connection.get_transaction(), TwoPhaseTransaction):
            return False
        if len(list(session.dispatch.after_begin)) > 1 or list(connection.dispatch.begin):
            # The application has a listener for BEGIN, which may need a transaction (to send `SET
            # LOCAL`, for example). This package cannot see what a listener sends on the driver's
            # own connection. So do not delay BEGIN.
            return False
        level = isolation_level(connection)
        return level != "AUTOCOMMIT" and (self._wanted is True or level == "READ COMMITTED")


def isolation_level(connection: Connection) -> str | None:
    """Return the isolation level of transactions on the connection; None if it is unknown."""
    level: str | None = connection.get_execution_options().get("isolation_level")
    default = connection.dialect.default_isolation_level
    return level or isolation_level_on_connect(connection) or default


def check_autocommit_reads(database: object, wanted: object, driver: str) -> None:
    """Raise an error for `autocommit_reads=True` if the driver does not support this option.

    Raises:
        ConfigurationError: The driver cannot switch autocommit on and off without a round trip to
            the server.
    """
    if wanted is not None and not isinstance(wanted, bool):
        raise ConfigurationError("autocommit_reads takes True, False or None.")
    if wanted and driver not in DRIVERS:
        raise ConfigurationError(
            f"{database} cannot read in autocommit: only {' and '.join(DRIVERS)} (PostgreSQL) "
            "change it without a round trip. Leave out `autocommit_reads=True`."
        )


def watch_reads(engine: Engine) -> None:
    """Add listeners to `engine` that send BEGIN before a statement that may write."""
    if engine.dialect.driver in DRIVERS and engine.dialect not in _watched:
        _watched.add(engine.dialect)
        for name, listener in _LISTENERS.items():
            event.listen(engine, name, listener)


def unwatch_reads(engine: Engine) -> None:
    """Remove the listeners that `watch_reads` added to `engine`."""
    if engine.dialect in _watched:
        _watched.discard(engine.dialect)
        for name, listener in _LISTENERS.items():
            if event.contains(engine, name, listener):
                event.remove(engine, name, listener)


def is_delayed(connection: Connection) -> bool:
    """Return True if the connection is in autocommit, because the session has only read so far."""
    return connection in _delayed


def has_only_read(connection: Connection) -> bool:
    """Return True if it is certain that no transaction with writes is open on the connection."""
    if connection.invalidated:  # A lost connection cannot be asked.
        return False
    if connection.dialect.name == "sqlite":
        driver: Any = connection.connection.driver_connection
        return not driver.in_transaction
    return connection in _delayed


def begin_now(connection: Connection) -> None:
    """Switch autocommit off, so that the driver sends BEGIN before the next statement."""
    if connection in _delayed:
        _set_autocommit(connection, False)
        connection.info.pop(_KEY, None)
        _delayed.discard(connection)


def begin_on_server(connection: Connection) -> None:
    """With asyncpg, send BEGIN now, because the application may use asyncpg's own connection next.

    For example, the application may call COPY on asyncpg's own connection. SQLAlchemy would send
    BEGIN only before the next statement that SQLAlchemy itself sends.
    """
    if connection.dialect.driver == "asyncpg":
        driver: Any = connection.connection.driver_connection
        if not driver.is_in_transaction():
            cursor = connection.connection.cursor()
            cursor.execute("")
            cursor.close()


def _begin_unless_plain(
    _cursor: object, _statement: str, _parameters: object, context: ExecutionContext
) -> None:
    connection = context.root_connection
    if connection in _delayed and not is_plain_read(context):
        begin_now(connection)


def _begin_always(*arguments: Any) -> None:
    begin_now(arguments[-1].root_connection)


def _restore(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    if record.info.pop(_KEY, False) and dbapi_connection is not None:
        dbapi_connection.autocommit = False


_LISTENERS: dict[str, Any] = {
    "do_execute": _begin_unless_plain,
    "do_executemany": _begin_always,
    "do_execute_no_params": _begin_always,
    "checkin": _restore,
}


def is_in_transaction(connection: Connection) -> bool:
    """Return True if a transaction is open on the driver's connection, whoever has begun it."""
    driver: Any = connection.connection.driver_connection
    if connection.dialect.driver == "asyncpg":
        return bool(driver.is_in_transaction())
    # The driver psycopg uses libpq. In libpq, 0 is PQTRANS_IDLE: no transaction is open.
    return bool(driver.info.transaction_status != 0)


def _set_autocommit(connection: Connection, value: bool) -> None:
    driver: Any = connection.connection.dbapi_connection
    driver.autocommit = value
