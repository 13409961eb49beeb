"""Sends BEGIN on SQLite before each statement that may write, so that a rollback undoes it."""

import re
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect, ExecutionContext

from asgi_dbsession.session.sqlite import ROLLED_BACK, WAS_OPEN, is_open

# The first word of a statement, after comments.
_FIRST_WORD = re.compile(r"(?:\s|--[^\n]*|/\*.*?\*/)*(\w*)", re.DOTALL)
_WORD = re.compile(r"\w+")
# Python's module `sqlite3` itself sends BEGIN before these statements.
_BY_DRIVER = frozenset(("INSERT", "UPDATE", "DELETE", "REPLACE"))
# These statements only read, or SQLite refuses or ignores them inside a transaction. Those in
# `_CONTROL` begin or end a transaction themselves. All other statements of SQLite may write.
# Source: https://www.sqlite.org/lang.html
_OUTSIDE = frozenset(("SELECT", "VALUES", "EXPLAIN", "VACUUM", "ATTACH", "DETACH"))
_CONTROL = frozenset(("BEGIN", "COMMIT", "END", "ROLLBACK", "RELEASE"))
# The PRAGMA statements that store a number in the file of the database, and roll it back. SQLite
# ignores other PRAGMA statements inside a transaction, so they must stay outside.
_NUMBERS = re.compile(
    r"\bPRAGMA\s+(?:\w+\s*\.\s*)?(?:application_id|schema_version|user_version)\s*[=(]",
    re.IGNORECASE,
)

# The dialects whose engines have the listeners of this module. An engine and its copies with other
# options share one dialect, so that no listener is added twice.
_watched: WeakSet[Dialect] = WeakSet()


def watch_sqlite(engine: Engine) -> None:
    """Add listeners to `engine` that send BEGIN."""
    if engine.dialect not in _watched:
        _watched.add(engine.dialect)
        for name in _EVENTS:
            event.listen(engine, name, _begin_before_statement)


def unwatch_sqlite(engine: Engine) -> None:
    """Remove the listeners that `watch_sqlite` added to `engine`."""
    if engine.dialect in _watched:
        _watched.discard(engine.dialect)
        for name in _EVENTS:
            event.remove(engine, name, _begin_before_statement)


def _begin_before_statement(*arguments: Any) -> None:
    statement: str = arguments[1]
    context: ExecutionContext = arguments[-1]
    connection = context.root_connection
    if WAS_OPEN not in vars(connection):
        return
    vars(connection)[WAS_OPEN] = was_open = is_open(connection)
    if not was_open and _needs_begin(connection, statement):
        _begin(connection)


def _needs_begin(connection: Connection, statement: str) -> bool:
    found = _FIRST_WORD.match(statement)
    word = found[1].upper() if found else ""
    if word in _BY_DRIVER:
        return bool(vars(connection).get(ROLLED_BACK))
    if word == "PRAGMA":
        return _NUMBERS.search(statement) is not None
    if word == "WITH":
        # A statement with common table expressions writes only if it has one of these words.
        return not _BY_DRIVER.isdisjoint(_WORD.findall(statement.upper()))
    return word not in _OUTSIDE | _CONTROL


def _begin(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    level = driver.isolation_level
    # Without an isolation level, the application has switched the driver to autocommit. Only newer
    # versions of Python have the attribute `autocommit`.
    is_autocommit = level is None or getattr(driver, "autocommit", None) is True
    if not is_autocommit or vars(connection).get(ROLLED_BACK, False):
        cursor = connection.connection.cursor()
        try:
            cursor.execute(f"BEGIN {level or ''}".strip())
        finally:
            cursor.close()


_EVENTS = ("do_execute", "do_executemany", "do_execute_no_params")
