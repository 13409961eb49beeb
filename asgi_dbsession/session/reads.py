"""Puts off BEGIN until a session does more than plain reads."""

from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect, ExecutionContext, TwoPhaseTransaction
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from asgi_dbsession.errors import ConfigurationError

from ._sqlalchemy import is_flushing, isolation_level_on_connect
from .plain_reads import is_plain_read

# The connections on which BEGIN was put off, and how the pool knows them when they come back.
_put_off: WeakSet[Connection] = WeakSet()
_KEY = "asgi_dbsession.put_off"

# The dialects of the engines that are watched. An engine and its copies with other options share a
# dialect and a pool.
_watched: WeakSet[Dialect] = WeakSet()

# The drivers that can leave and enter autocommit without asking the server.
_DRIVERS = ("asyncpg", "psycopg")


class Reads:
    """Whether the sessions of a database read without a transaction.

    At READ COMMITTED each statement sees its own snapshot anyway, so BEGIN and COMMIT around a read
    are two round trips for nothing.
    Source: https://www.postgresql.org/docs/current/transaction-iso.html

    Args:
        wanted: True also at other isolation levels; False never; None where nobody can tell.
    """

    def __init__(self, wanted: bool | None) -> None:
        self._wanted = wanted
        self.is_shared: bool = False  # inside of `rolled_back`, all share one transaction

    def put_off_begin(self, session: Session, connection: Connection) -> None:
        """Read in autocommit until another statement comes, if this connection allows it."""
        if self._wanted is False or self.is_shared or not self._can_put_off(session, connection):
            return
        # In this order, a signal handler that raises in between does no harm.
        connection.info[_KEY] = True
        _put_off.add(connection)
        _set_autocommit(connection, True)

    def _can_put_off(self, session: Session, connection: Connection) -> bool:
        dialect = connection.dialect
        if dialect not in _watched or connection.engine is not session.bind:
            return False
        if is_flushing(session) or _is_in_transaction(connection):
            return False
        if connection.in_nested_transaction():  # SQLAlchemy tells of savepoints too
            return False
        if isinstance(connection.get_transaction(), TwoPhaseTransaction):
            return False
        if len(list(session.dispatch.after_begin)) > 1 or list(connection.dispatch.begin):
            # A listener of the application (`SET LOCAL`) may use the driver's own connection.
            return False
        level = connection.get_execution_options().get("isolation_level")
        level = level or isolation_level_on_connect(connection) or dialect.default_isolation_level
        return level != "AUTOCOMMIT" and (self._wanted is True or level == "READ COMMITTED")


def check_autocommit_reads(database: object, wanted: object, driver: str) -> None:
    """Refuse `autocommit_reads=True` where it cannot work.

    Raises:
        ConfigurationError: The driver asks the server for each change of autocommit, or has none.
    """
    if wanted is not None and not isinstance(wanted, bool):
        raise ConfigurationError("autocommit_reads takes True, False or None.")
    if wanted and driver not in _DRIVERS:
        raise ConfigurationError(
            f"{database} cannot read in autocommit: only {' and '.join(_DRIVERS)} (PostgreSQL) "
            "change it without a round trip. Leave out `autocommit_reads=True`."
        )


def watch_reads(engine: Engine) -> None:
    """Have `engine` begin a transaction before a statement that does more than read."""
    if engine.dialect.driver in _DRIVERS and engine.dialect not in _watched:
        _watched.add(engine.dialect)
        for name, listener in _LISTENERS.items():
            event.listen(engine, name, listener)


def unwatch_reads(engine: Engine) -> None:
    """Undo `watch_reads`."""
    if engine.dialect in _watched:
        _watched.discard(engine.dialect)
        for name, listener in _LISTENERS.items():
            if event.contains(engine, name, listener):
                event.remove(engine, name, listener)


def begin_now(connection: Connection) -> None:
    """Begin what was put off: the application may work on the driver's own connection."""
    if connection in _put_off:
        _set_autocommit(connection, False)
        connection.info.pop(_KEY, None)
        _put_off.discard(connection)


def begin_on_server(connection: Connection) -> None:
    """Send BEGIN before the application works on the driver's own connection (COPY).

    For asyncpg, SQLAlchemy sends BEGIN together with the first statement that it knows of.
    """
    if connection.dialect.driver == "asyncpg":
        driver: Any = connection.connection.driver_connection
        if not driver.is_in_transaction():
            cursor = connection.connection.cursor()
            cursor.execute("")
            cursor.close()


def begin_before_savepoint(connection: Connection) -> None:
    """Send BEGIN to SQLite before the first savepoint of a transaction.

    Python's driver sends it only before the first write, and not after a savepoint. RELEASE of that
    savepoint would then be a COMMIT, and a later ROLLBACK would find nothing to roll back.
    """
    if connection.dialect.name == "sqlite":
        driver: Any = connection.connection.driver_connection
        if driver.isolation_level is not None and not driver.in_transaction:
            connection.exec_driver_sql("BEGIN")


def _begin_unless_plain(
    _cursor: object, _statement: str, _parameters: object, context: ExecutionContext
) -> None:
    connection = context.root_connection
    if connection in _put_off and not is_plain_read(context):
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


def _is_in_transaction(connection: Connection) -> bool:
    """Whether the driver has begun one already, for a listener of the pool, say."""
    driver: Any = connection.connection.driver_connection
    if connection.dialect.driver == "asyncpg":
        return bool(driver.is_in_transaction())
    return bool(driver.info.transaction_status != 0)  # libpq's PQTRANS_IDLE


def _set_autocommit(connection: Connection, value: bool) -> None:
    driver: Any = connection.connection.dbapi_connection
    driver.autocommit = value
