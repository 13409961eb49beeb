"""Makes the transaction of a session read-only, so that the database itself refuses writes."""

from typing import Any
from weakref import ref

from sqlalchemy import Connection
from sqlalchemy.pool import StaticPool
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_dbsession.session._sqlalchemy import on_checkin
from asgi_dbsession.session.completion import run_before_cancellation
from asgi_dbsession.session.read_only import ON_MARIADB, ON_POSTGRESQL
from asgi_dbsession.session.reads import DRIVERS, delayed, is_in_transaction

# The error codes that databases report for a write in a read-only transaction. Sources: PostgreSQL
# https://www.postgresql.org/docs/current/errcodes-appendix.html MariaDB
# https://mariadb.com/kb/en/mariadb-error-code-reference/ and SQLite
# https://www.sqlite.org/rescode.html
_POSTGRESQL, _MARIADB, _SQLITE = "25006", 1792, 8


def begin_read_only(connection: Connection) -> None:
    """Make a transaction read-only, at once after it has begun on the connection.

    With asyncpg and psycopg, `READ ONLY` is sent together with BEGIN. With other drivers of
    PostgreSQL, and with MySQL and MariaDB, this costs one more round trip to the server. For
    SQLite, `PRAGMA query_only` refuses writes. Any other database still accepts writes.
    """
    name = connection.dialect.name
    if name == "postgresql":
        _begin_on_postgresql(connection)
    elif name in {"mysql", "mariadb"}:
        # Do not send START TRANSACTION READ ONLY yet if BEGIN is delayed. Never send it if
        # SQLAlchemy sends no ROLLBACK: the next user of the connection could not write.
        if ref(connection) not in delayed and not _skips_rollback(connection):
            connection.exec_driver_sql(ON_MARIADB)
    elif name == "sqlite" and not isinstance(connection.engine.pool, StaticPool):
        # With StaticPool, all sessions share one connection. `PRAGMA query_only` would refuse the
        # writes of other sessions too, so it is not used there.
        _begin_on_sqlite(connection)


def set_savepoint_read_only(connection: Connection) -> None:
    """Make the current savepoint read-only on PostgreSQL; do nothing on other databases.

    PostgreSQL then refuses writes until the savepoint ends. MariaDB, MySQL and SQLite have no
    read-only savepoints.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(ON_POSTGRESQL)


def is_refusal(error: BaseException) -> bool:
    """Return True if the database reports that it refused a write in a read-only transaction."""
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if state == _POSTGRESQL or getattr(error, "sqlite_errorcode", 0) & 0xFF == _SQLITE:
        return True
    return bool(error.args) and error.args[0] == _MARIADB


def _begin_on_postgresql(connection: Connection) -> None:
    dialect: Any = connection.dialect
    if dialect.driver not in DRIVERS or is_in_transaction(connection):
        connection.exec_driver_sql(ON_POSTGRESQL)
        return
    driver = connection.connection.dbapi_connection
    earlier = dialect.get_readonly(driver)
    if not earlier:
        on_checkin(connection, lambda returned: dialect.set_readonly(returned, earlier))
        dialect.set_readonly(driver, True)


def _skips_rollback(connection: Connection) -> bool:
    """Return True if the connection is in autocommit mode and SQLAlchemy sends no ROLLBACK on it.

    SQLAlchemy 2.0.43 and newer sends no ROLLBACK if its option `skip_autocommit_rollback` is set.
    """
    dialect: Any = connection.dialect
    driver = connection.connection.dbapi_connection
    return getattr(dialect, "skip_autocommit_rollback", False) and bool(
        dialect.detect_autocommit_setting(driver)
    )


def _begin_on_sqlite(connection: Connection) -> None:
    driver = connection.connection.dbapi_connection
    is_async = connection.dialect.is_async
    if not _ask(driver, "PRAGMA query_only")[0]:
        on_checkin(connection, lambda returned: _allow_writes(returned, is_async))
        _ask(driver, "PRAGMA query_only = ON")


def _allow_writes(driver: Any, is_async: bool) -> None:
    statement = "PRAGMA query_only = OFF"
    if is_async:
        # If a cancellation raised its exception here, the connection would not return to the pool.
        # So `run_before_cancellation` delays the exception.
        await_only(run_before_cancellation(greenlet_spawn(_ask, driver, statement)))
    else:
        _ask(driver, statement)


def _ask(driver: Any, statement: str) -> Any:
    cursor = driver.cursor()
    try:
        cursor.execute(statement)
        return cursor.fetchone()
    finally:
        cursor.close()
