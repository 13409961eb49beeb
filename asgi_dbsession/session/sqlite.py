"""Sends BEGIN on SQLite before each statement that may write, so that a rollback undoes it."""

import re
from contextlib import suppress
from sqlite3 import ProgrammingError
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.orm import SessionTransaction

from asgi_dbsession.errors import ConfigurationError, without_secrets

from ._sqlalchemy import listen_first, stop_listening
from .roll_back import roll_back_or_discard

# The first word of a statement, after comments.
_FIRST_WORD = re.compile(r"(?:\s|--[^\n]*|/\*.*?\*/)*(\w*)", re.DOTALL)
_WORD = re.compile(r"\w+")
# Python's `sqlite3` itself sends BEGIN before INSERT, UPDATE, DELETE and REPLACE. This package
# sends BEGIN only after SQLite has rolled back the transaction at an error.
_BY_DRIVER = frozenset(("INSERT", "UPDATE", "DELETE", "REPLACE"))
# No BEGIN is sent before statements that only read, or that SQLite refuses or ignores inside a
# transaction. Source: https://www.sqlite.org/lang.html
_OUTSIDE = frozenset(("SELECT", "VALUES", "EXPLAIN", "VACUUM", "ATTACH", "DETACH"))
# No BEGIN is sent before statements that begin or end a transaction themselves.
_CONTROL = frozenset(("BEGIN", "COMMIT", "END", "ROLLBACK", "RELEASE"))
# BEGIN is sent before these three PRAGMA statements. Each of them stores a number in the database
# file, and a rollback must restore the old number. No BEGIN is sent before other PRAGMA statements,
# because SQLite ignores many of them inside a transaction.
_NUMBERS = re.compile(
    r"\bPRAGMA\s+(?:\w+\s*\.\s*)?(?:application_id|schema_version|user_version)\s*[=(]",
    re.IGNORECASE,
)

# An attribute of a session's connection: True if a transaction was open before the last statement.
_WAS_OPEN = "asgi_dbsession_was_open"
# An attribute of a session's connection: True if an error has made SQLite roll back the
# transaction. BEGIN is sent before later writes, which must be rolled back too.
_ROLLED_BACK = "asgi_dbsession_rolled_back"

_EVENTS = ("do_execute", "do_executemany", "do_execute_no_params")


def watch_sqlite(engine: Engine) -> None:
    """If `engine` is for SQLite, add listeners to it that send BEGIN.

    Args:
        engine: The original engine, not a copy that `Engine.execution_options` has made.
    """
    if engine.dialect.name == "sqlite":
        for name in _EVENTS:
            listen_first(engine, name, _begin_before_statement)


def unwatch_sqlite(engine: Engine) -> None:
    """Remove the listeners that `watch_sqlite` added to `engine`."""
    for name in _EVENTS:
        stop_listening(engine, name, _begin_before_statement)


def begin_for_session(transaction: SessionTransaction, connection: Connection) -> None:
    """Mark an SQLite connection of a session, so that BEGIN is sent before the first write.

    Called when the session gets the connection. Without BEGIN, a rollback could not undo the write.

    Raises:
        ConfigurationError: The connection was opened with the driver's option `autocommit`. The
            driver's `commit()` does nothing then, so the transaction could not be committed.
    """
    if connection.dialect.name == "sqlite" and not transaction.nested:
        if _ignores_commit(connection.connection.driver_connection):
            raise ConfigurationError(
                f"The connection to {without_secrets(connection.engine.url)} was opened with "
                "`autocommit=True`, and SQLite's driver then ignores each COMMIT of a session. "
                "Leave `autocommit` out where the engine is made, or write "
                '`isolation_level="AUTOCOMMIT"` instead.'
            )
        # Add two attributes to the connection object, which the listener for statements reads. Do
        # not use a `WeakKeyDictionary` instead. Python ignores exceptions while it removes an entry
        # of such a dictionary. So the exception of a signal handler (for Ctrl-C) could be lost.
        vars(connection).update({_WAS_OPEN: False, _ROLLED_BACK: False})


def _ignores_commit(driver: Any) -> bool:
    try:
        # aiosqlite has no attribute `autocommit`, but the connection of `sqlite3` inside it has.
        return getattr(getattr(driver, "_conn", driver), "autocommit", None) is True
    # This thread may not read the attribute `autocommit`, because the application has opened the
    # file without `check_same_thread=False`. Only aiosqlite's own thread may. So skip the check.
    # A closed connection raises an error too: `ProgrammingError`, or `ValueError` with aiosqlite.
    except (ProgrammingError, ValueError):
        return False


def was_rolled_back(connection: Connection) -> bool:
    """Called after an error: return True if it made SQLite roll back the whole transaction.

    This happens at `INSERT OR ROLLBACK`, at `RAISE(ROLLBACK)` in a trigger, and at some errors of
    the disk. SQLite then answers the next statements as if nothing had happened. Source:
    https://www.sqlite.org/lang_transaction.html
    """
    if not vars(connection).get(_WAS_OPEN) or _is_open(connection):
        return False
    vars(connection)[_ROLLED_BACK] = True
    return True


def end_failed_commit(connection: Connection) -> None:
    """Send ROLLBACK after a failed COMMIT, because SQLite keeps its transaction open.

    SQLAlchemy believes that the transaction has ended. If the application closed the session now,
    the pool would get the connection with the open transaction.
    """
    if _WAS_OPEN in vars(connection) and _is_open(connection):
        vars(connection)[_ROLLED_BACK] = True
        with suppress(Exception):
            roll_back_or_discard(connection)


def has_open_work(connection: Connection) -> bool:
    """Return True if the transaction of an SQLite connection may have written.

    On SQLite, this package sends BEGIN only before a statement that may write. So every transaction
    that was begun may have written, even if SQLite has rolled it back after an error.
    """
    return _is_open(connection) or bool(vars(connection).get(_ROLLED_BACK))


def _begin_before_statement(*arguments: Any) -> None:
    statement: str = arguments[1]
    context: ExecutionContext = arguments[-1]
    connection = context.root_connection
    if _WAS_OPEN not in vars(connection):
        return
    vars(connection)[_WAS_OPEN] = is_open = _is_open(connection)
    if not is_open and _needs_begin(connection, statement):
        _begin(connection)


def _needs_begin(connection: Connection, statement: str) -> bool:
    found = _FIRST_WORD.match(statement)
    word = found[1].upper() if found else ""
    if word in _BY_DRIVER:
        return bool(vars(connection).get(_ROLLED_BACK))
    if word == "PRAGMA":
        return _NUMBERS.search(statement) is not None
    if word == "WITH":
        # A statement that begins with WITH can write only if it contains the word INSERT, UPDATE,
        # DELETE or REPLACE.
        return not _BY_DRIVER.isdisjoint(_WORD.findall(statement.upper()))
    return word not in _OUTSIDE | _CONTROL


def _begin(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    level = driver.isolation_level
    # Send no BEGIN if the attribute `isolation_level` of the `sqlite3` connection is None. Then the
    # application has switched the driver to autocommit. But after an error has made SQLite roll
    # back a transaction, always send BEGIN, so that later writes are rolled back too.
    if level is not None or vars(connection).get(_ROLLED_BACK, False):
        cursor = connection.connection.cursor()
        try:
            cursor.execute(f"BEGIN {level or ''}".strip())
        finally:
            cursor.close()


def _is_open(connection: Connection) -> bool:
    driver: Any = connection.connection.driver_connection
    try:
        return bool(driver.in_transaction)
    # The application has closed the driver's connection. The next statement tells SQLAlchemy.
    except (ProgrammingError, ValueError):
        return True
