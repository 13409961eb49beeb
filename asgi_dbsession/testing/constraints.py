"""Checks deferred constraints in the same way as COMMIT, but without a COMMIT."""

from typing import Any

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import PoolProxiedConnection

# This statement checks all deferred constraints. Then it defers only constraints that are declared
# INITIALLY DEFERRED. SET CONSTRAINTS ALL DEFERRED would also defer constraints that are INITIALLY
# IMMEDIATE.
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
    """Execute a statement without SQLAlchemy's events and log, and return its rows."""
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
        return list(cursor.fetchall()) if cursor.description else []
    finally:
        cursor.close()


def violations(connection: PoolProxiedConnection, dialect: Dialect) -> set[Any]:
    """Return the rows that break a foreign key on SQLite.

    On any other database, or if SQLite does not enforce foreign keys, the result is empty.
    """
    if dialect.name != "sqlite" or send(connection, "PRAGMA foreign_keys") != [(1,)]:
        return set()
    return set(send(connection, "PRAGMA foreign_key_check"))


def check_as_commit_would(
    connection: PoolProxiedConnection, dialect: Dialect, known: set[Any]
) -> None:
    """Raise the error of the driver if COMMIT would fail.

    MariaDB has no deferred constraints. SQLite checks deferred constraints only at the end of the
    outermost transaction, not at the end of a savepoint.
    Source: https://www.sqlite.org/foreignkeys.html#fk_deferred

    Args:
        connection: The connection with the work to commit.
        dialect: The dialect of the engine.
        known: The violations that existed before the test; COMMIT would ignore them.

    Raises:
        Exception: The `IntegrityError` of the driver.
    """
    if dialect.name == "postgresql":
        send(connection, _POSTGRESQL)
    elif violations(connection, dialect) - known:
        raise dialect.loaded_dbapi.IntegrityError("FOREIGN KEY constraint failed")
