"""How many statements a part of a test may send."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from sqlalchemy import Engine, event

from asgi_dbsession.database.async_database import AsyncDatabase
from asgi_dbsession.database.base import Database
from asgi_dbsession.database.sync_database import SyncDatabase


@contextmanager
def count_statements(
    *databases: AsyncDatabase[Any] | SyncDatabase[Any], at_most: int | None = None
) -> Iterator[list[str]]:
    """Note each statement that anyone sends to the databases, savepoints included.

    A plain `with`, in async tests too. It works with and without `rolled_back`, whose own
    statements do not count; BEGIN, COMMIT and ROLLBACK do not either.

    Args:
        *databases: They must be running.
        at_most: How many there may be; None for any number.

    Yields:
        The statements so far, with their parameters, in the order in which they were sent. One
        that is sent with many sets of parameters at once is one.

    Raises:
        AssertionError: There were more; the message shows them.
        DatabaseNotRunning: A database has not been started.
    """
    statements: list[str] = []

    def note(
        _connection: Any, _cursor: Any, statement: str, parameters: Any, *_others: Any
    ) -> None:
        text = " ".join(statement.split())
        statements.append(f"{text}  {parameters!r}" if parameters else text)

    with ExitStack() as stack:
        for database in databases:
            engine = _sync_engine(database)
            event.listen(engine, "before_cursor_execute", note)
            stack.callback(event.remove, engine, "before_cursor_execute", note)
        yield statements
    if at_most is not None and len(statements) > at_most:
        lines = [f"{number}. {each}" for number, each in enumerate(statements, 1)]
        shown = "\n".join(lines)
        raise AssertionError(f"{len(statements)} statements instead of at most {at_most}:\n{shown}")


def _sync_engine(database: Database[Any, Any]) -> Engine:
    return database._sync_engine(database.engine)
