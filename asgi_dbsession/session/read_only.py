"""Makes the transaction of a session read-only, so that the database itself refuses writes."""

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.pool import StaticPool

from ._sqlalchemy import on_checkin
from .reads import DRIVERS, is_in_transaction

# The error codes for a write in a read-only transaction, of PostgreSQL, MariaDB and SQLite.
# Sources: https://www.postgresql.org/docs/current/errcodes-appendix.html
# https://mariadb.com/kb/en/mariadb-error-code-reference/ and https://www.sqlite.org/rescode.html
_POSTGRESQL, _MARIADB, _SQLITE = "25006", 1792, 8

_ON_MARIADB, _ON_POSTGRESQL = "START TRANSACTION READ ONLY", "SET TRANSACTION READ ONLY"
# The statements that make a transaction read-only; `DatabaseReport.statements` does not count them.
PARTS_OF_BEGIN = frozenset((_ON_MARIADB, _ON_POSTGRESQL))


def begin_read_only(connection: Connection) -> None:
    """Make the transaction read-only that has just begun on the connection.

    With asyncpg and psycopg, `READ ONLY` is a part of BEGIN. Other drivers of PostgreSQL, MySQL and
    MariaDB need one more round trip. SQLite refuses writes because of `PRAGMA query_only`. Any
    other database accepts writes.
    """
    name = connection.dialect.name
    if name == "postgresql":
        _begin_on_postgresql(connection)
    elif name in {"mysql", "mariadb"}:
        # Without ROLLBACK, the next user of the connection would get the read-only transaction.
        if not _skips_rollback(connection):
            connection.exec_driver_sql(_ON_MARIADB)
    elif name == "sqlite" and not isinstance(connection.engine.pool, StaticPool):
        _begin_on_sqlite(connection)


def set_savepoint_read_only(connection: Connection) -> None:
    """Make the innermost savepoint read-only; only PostgreSQL can do this.

    Until the savepoint ends, PostgreSQL refuses writes. On other databases, do nothing.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(_ON_POSTGRESQL)


def is_refusal(error: BaseException) -> bool:
    """Return True if the database refused the statement because of `READ ONLY`."""
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if state == _POSTGRESQL or getattr(error, "sqlite_errorcode", 0) & 0xFF == _SQLITE:
        return True
    return bool(error.args) and error.args[0] == _MARIADB


def _begin_on_postgresql(connection: Connection) -> None:
    dialect: Any = connection.dialect
    if dialect.driver not in DRIVERS or is_in_transaction(connection):
        connection.exec_driver_sql(_ON_POSTGRESQL)
        return
    driver = connection.connection.dbapi_connection
    earlier = dialect.get_readonly(driver)
    if not earlier:
        on_checkin(connection, lambda returned: dialect.set_readonly(returned, earlier))
        dialect.set_readonly(driver, True)


def _skips_rollback(connection: Connection) -> bool:
    """Return True if the connection is in AUTOCOMMIT and SQLAlchemy sends no ROLLBACK on it.

    SQLAlchemy has the option `skip_autocommit_rollback` since version 2.0.43.
    """
    dialect: Any = connection.dialect
    driver = connection.connection.dbapi_connection
    return getattr(dialect, "skip_autocommit_rollback", False) and bool(
        dialect.detect_autocommit_setting(driver)
    )


def _begin_on_sqlite(connection: Connection) -> None:
    driver = connection.connection.dbapi_connection
    if not _ask(driver, "PRAGMA query_only")[0]:
        on_checkin(connection, lambda returned: _ask(returned, "PRAGMA query_only = OFF"))
        _ask(driver, "PRAGMA query_only = ON")


def _ask(driver: Any, statement: str) -> Any:
    cursor = driver.cursor()
    try:
        cursor.execute(statement)
        return cursor.fetchone()
    finally:
        cursor.close()
