"""Decides if an error of a driver is a conflict with another transaction."""

from typing import Any

# An SQLSTATE that begins with 40 means that the database has rolled back, so a retry is safe. But
# after 40003, the COMMIT may have succeeded. Source:
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_ROLLBACK, _UNKNOWN = "40", "40003"
# A migration has changed the type of a column that a prepared statement returns. A retry succeeds,
# because the driver prepares the statement again.
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
    # Check MySQL's error number first: the SQLSTATE of error 1205 (a lock was not free in time)
    # shows no conflict.
    number = error.args[0] if error.args else None
    # Search `_MYSQL` (MySQL's error numbers for conflicts) only if the first argument of the error
    # is an integer. An exception of the application may have a NumPy array as its argument, and
    # `in` would raise an error for an array.
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
