"""Counts the statements that are sent in a part of a test."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session

from asgi_dbsession.database.arguments import check_number
from asgi_dbsession.database.async_database import AsyncDatabase
from asgi_dbsession.database.sync_database import SyncDatabase
from asgi_dbsession.session._sqlalchemy import original_engine
from asgi_dbsession.session.read_only import PARTS_OF_BEGIN

from .engine import check_databases, engines_of


@contextmanager
def count_statements(
    *databases: AsyncDatabase[Any] | SyncDatabase[Any], at_most: int | None = None
) -> Iterator[list[str]]:
    """Record each statement that is sent to the databases in the `with` block.

    Write `with` in async tests too. BEGIN, COMMIT and ROLLBACK are not counted, nor the savepoints
    that replace them in `rolled_back`. Savepoints of the application are counted. All engines that
    sessions of the databases use are included, also those in `binds`.

    Args:
        *databases: The databases to watch. They must be running.
        at_most: How many statements are allowed. None for any number.

    Yields:
        A list of the statements sent so far, with their parameters. A statement with many sets of
            parameters (`executemany`) counts once.

    Raises:
        AssertionError: There were more statements than `at_most`. The error text shows all of them.
        DatabaseNotRunning: A database has not been started.
        ConfigurationError: No database was given, or `at_most` is not a whole number.
    """
    check_databases("count_statements", databases)
    if at_most is not None:
        check_number("at_most", at_most, 0)
    statements: list[str] = []
    with ExitStack() as stack:
        recorder = _Recorder(statements, stack)
        for database in databases:
            # Read the property `engine` only because it raises DatabaseNotRunning if the database
            # was not started.
            _ = database.engine
            for engine in engines_of(database):
                recorder.listen(engine)
            sessions = database._orm_class
            event.listen(sessions, "after_begin", recorder.listen_to_session)
            stack.callback(event.remove, sessions, "after_begin", recorder.listen_to_session)
        yield statements
    if at_most is not None and len(statements) > at_most:
        lines = [f"{number}. {each}" for number, each in enumerate(statements, 1)]
        shown = "\n".join(lines)
        raise AssertionError(f"{len(statements)} statements instead of at most {at_most}:\n{shown}")


class _Recorder:
    """Records the statements of engines until the `count_statements` block ends."""

    def __init__(self, statements: list[str], stack: ExitStack) -> None:
        self._statements = statements
        self._stack = stack
        self._engines: set[Engine] = set()

    def listen(self, engine: Engine) -> None:
        if engine not in self._engines:
            self._engines.add(engine)
            event.listen(engine, "before_cursor_execute", self.record)
            self._stack.callback(event.remove, engine, "before_cursor_execute", self.record)

    def listen_to_session(
        self, _session: Session, _transaction: object, connection: Connection
    ) -> None:
        self.listen(original_engine(connection.engine))

    def record(
        self, _connection: Any, _cursor: Any, statement: str, parameters: Any, *_others: Any
    ) -> None:
        if statement in PARTS_OF_BEGIN:
            return
        text = " ".join(statement.split())
        self._statements.append(f"{text}  {parameters!r}" if parameters else text)
