"""Finds out if the outer transaction of a test, which is never committed, has ended too early."""

from typing import Any

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_dbsession.session.completion import run_before_cancellation

from .constraints import send
from .isolation import NotIsolated

# All work of a test is done in one outer transaction, which is never committed. `MARK` creates a
# savepoint at its beginning. At the end of the test, `UNDO` rolls back to this savepoint. If the
# outer transaction has ended too early, the savepoint is gone. Then `UNDO` fails, and so does the
# test.
MARK = "SAVEPOINT asgi_dbsession_test"
UNDO = "ROLLBACK TO SAVEPOINT asgi_dbsession_test"

# How a database reports that a savepoint does not exist. MariaDB and MySQL have an error number.
# PostgreSQL has one code inside a transaction, and another code outside. SQLite has only a message.
_ON_MARIADB, _ON_POSTGRESQL, _ON_SQLITE = 1305, ("3B001", "25P01"), "no such savepoint"


def send_inside(
    connection: PoolProxiedConnection, dialect: Dialect, database: str, statement: str
) -> None:
    """Send a statement that creates, releases or rolls back to a savepoint.

    If the task is cancelled meanwhile, complete the statement first. Otherwise it would be unknown
    if the savepoint exists. The task gets the cancellation at its next `await`.

    Raises:
        NotIsolated: The outer transaction has ended, so the savepoint cannot exist.
    """
    arguments = connection, dialect, database, statement
    if dialect.is_async:
        await_only(run_before_cancellation(greenlet_spawn(_send_inside, *arguments)))
    else:
        _send_inside(*arguments)


def _send_inside(
    connection: PoolProxiedConnection, dialect: Dialect, database: str, statement: str
) -> None:
    driver: Any = connection.driver_connection
    if dialect.name == "sqlite" and not driver.in_transaction:
        # SQLite is in no transaction, so something has ended the outer transaction of the test. Do
        # not send the statement: SAVEPOINT would begin a transaction, and RELEASE would commit it.
        raise _ended_early(database)
    try:
        send(connection, statement)
    except dialect.loaded_dbapi.Error as error:
        if _is_gone(error):
            raise _ended_early(database) from error
        raise


def _is_gone(error: BaseException) -> bool:
    if _ON_MARIADB in error.args or getattr(error, "sqlstate", None) in _ON_POSTGRESQL:
        return True
    return str(error).startswith(_ON_SQLITE)


def _ended_early(database: str) -> NotIsolated:
    return NotIsolated(
        database,
        f"The outer transaction of the test has ended on {database}, so its work may be stored, or "
        "lost. Something sent COMMIT or ROLLBACK past SQLAlchemy (on the driver's own connection, "
        'or as `text("COMMIT")`), or MariaDB has committed by itself, as it does at CREATE TABLE, '
        "TRUNCATE and the like, or there was an error at which SQLite rolls back everything.",
        "Commit with SQLAlchemy, create tables before the test, or test this code on a separate "
        "database, without `rolled_back`.",
    )
