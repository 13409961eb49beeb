"""Decides if an error of a driver is a conflict with another transaction."""

from typing import Any

# After an error with an SQLSTATE that begins with 40, the database has rolled back the transaction,
# so a retry is safe. Only 40003 is different: nobody knows if the COMMIT has succeeded. Source:
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_ROLLBACK, _UNKNOWN = "40", "40003"
# PostgreSQL raises this error if a migration has changed the type of a column that a prepared
# statement returns. After ROLLBACK the driver prepares the statement again, so a retry succeeds.
# For asyncpg, compare the class of the error, because the server may translate the message.
_NOT_SUPPORTED, _STALE_PLAN = "0A000", "cached plan must not change result type"
_STALE_PLAN_CLASS = "InvalidCachedStatementError"
# The error numbers of MySQL and MariaDB for a deadlock, for a lock that was not free in time, and
# for a row that changed after it was read. Source:
# https://mariadb.com/kb/en/mariadb-error-code-reference/
_MYSQL = (1213, 1205, 1020)
# SQLite reports SQLITE_BUSY (the database is locked) in the lower 8 bits of its error code. Source:
# https://www.sqlite.org/rescode.html
_SQLITE_BUSY = 5


def is_conflict(error: Any) -> bool:
    """Return True if the error is a conflict: a serialization failure, a deadlock or similar."""
    # Look at MySQL's error number before the SQLSTATE. The error 1205 (a lock was not free in time)
    # is a conflict, but its SQLSTATE does not say so. Look at integers only: an exception that the
    # application has raised may have a NumPy array as its argument, and `in _MYSQL` would fail.
    number = error.args[0] if error.args else None
    if isinstance(number, int) and number in _MYSQL:
        return True
    # asyncpg raises an error of this class if a migration has made a prepared statement outdated.
    # Some versions of asyncpg give no SQLSTATE for this error, so compare the name of its class.
    if type(error).__name__ == _STALE_PLAN_CLASS:
        return True
    # In the driver psycopg2, the attribute with the SQLSTATE is called `pgcode`.
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if isinstance(state, str):
        if state == _NOT_SUPPORTED:
            return _STALE_PLAN in str(error)
        return state.startswith(_ROLLBACK) and state != _UNKNOWN
    sqlite_code = getattr(error, "sqlite_errorcode", None)
    return isinstance(sqlite_code, int) and sqlite_code & 0xFF == _SQLITE_BUSY
