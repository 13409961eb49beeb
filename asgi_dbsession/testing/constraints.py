"""Finds what COMMIT would refuse, without a COMMIT."""

from typing import Any

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import PoolProxiedConnection

# Checks what COMMIT would check. Afterwards each constraint is again as its table declares it; ALL
# DEFERRED would also defer the constraints that are INITIALLY IMMEDIATE.
_POSTGRESQL = """
DO $$
DECLARE
    deferred text;
BEGIN
    SET CONSTRAINTS ALL IMMEDIATE;
    SELECT string_agg(DISTINCT quote_ident(nspname) || '.' || quote_ident(conname), ', ')
        INTO deferred
        FROM pg_catalog.pg_constraint
        JOIN pg_catalog.pg_namespace ON pg_namespace.oid = connamespace
        WHERE condeferred;
    IF deferred IS NOT NULL THEN
        EXECUTE 'SET CONSTRAINTS ' || deferred || ' DEFERRED';
    END IF;
END
$$
"""


def send(connection: PoolProxiedConnection, statement: str) -> list[Any]:
    """Execute a statement without SQLAlchemy's events and log; returns its rows."""
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
        return list(cursor.fetchall()) if cursor.description else []
    finally:
        cursor.close()


def violations(connection: PoolProxiedConnection, dialect: Dialect) -> set[Any]:
    """The rows that break a foreign key, on an SQLite that enforces them; none elsewhere."""
    if dialect.name != "sqlite" or send(connection, "PRAGMA foreign_keys") != [(1,)]:
        return set()
    return set(send(connection, "PRAGMA foreign_key_check"))


def check_as_commit_would(
    connection: PoolProxiedConnection, dialect: Dialect, known: set[Any]
) -> None:
    """Raise the driver's error if COMMIT would.

    MariaDB defers no constraint. SQLite enforces deferred ones at the end of the outermost
    transaction only, not of a savepoint.
    Source: https://www.sqlite.org/foreignkeys.html#fk_deferred

    Args:
        connection: The connection with the work that is to be committed.
        dialect: The dialect of its engine.
        known: The violations from before the test, which COMMIT ignores.

    Raises:
        Exception: The driver's `IntegrityError`.
    """
    if dialect.name == "postgresql":
        send(connection, _POSTGRESQL)
    elif violations(connection, dialect) - known:
        raise dialect.loaded_dbapi.IntegrityError("FOREIGN KEY constraint failed")
