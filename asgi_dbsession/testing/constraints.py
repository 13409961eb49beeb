"""Checks deferred constraints without a COMMIT, so that a test can roll back afterwards."""

from typing import Any

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import PoolProxiedConnection

# This block of SQL checks all deferred constraints. Then it makes those constraints deferred again
# that are declared INITIALLY DEFERRED. The shorter SET CONSTRAINTS ALL DEFERRED would also defer
# those that are INITIALLY IMMEDIATE.
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
    """Send a statement without SQLAlchemy, so that no listener or log sees it. Return its rows."""
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
        return list(cursor.fetchall()) if cursor.description else []
    finally:
        cursor.close()


def violations(connection: PoolProxiedConnection, dialect: Dialect) -> set[Any]:
    """Return the rows of an SQLite database that break a foreign key.

    The result is empty for other databases, and if SQLite does not check foreign keys.
    """
    if dialect.name != "sqlite" or send(connection, "PRAGMA foreign_keys") != [(1,)]:
        return set()
    return set(send(connection, "PRAGMA foreign_key_check"))


def check_as_commit_would(
    connection: PoolProxiedConnection, dialect: Dialect, known: set[Any]
) -> None:
    """Raise the driver's IntegrityError if COMMIT would fail because of a deferred constraint.

    In a test, this package sends RELEASE SAVEPOINT instead of COMMIT. On SQLite, RELEASE SAVEPOINT
    does not check deferred foreign keys. So search for rows that break a foreign key. Ignore the
    rows in `known`, which have broken a foreign key since before the test. Source:
    https://www.sqlite.org/foreignkeys.html#fk_deferred
    """
    if dialect.name == "postgresql":
        send(connection, _POSTGRESQL)
    elif violations(connection, dialect) - known:
        raise dialect.loaded_dbapi.IntegrityError("FOREIGN KEY constraint failed")
