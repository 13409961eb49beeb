"""What can go wrong, in the user's words: who, what happened, and the cure."""

import asyncio
import threading
from typing import Any

from sqlalchemy.exc import PendingRollbackError


class DBSessionError(Exception):
    """Base of every error that this package raises itself.

    Errors of SQLAlchemy and of the driver are not wrapped: they reach you as they are.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the finished text: `__init__` of a subclass takes what the text is made from."""
        return _restore_error, (type(self), self.args), vars(self)


class NoSession(DBSessionError, LookupError):
    """A session was asked for where no unit of work is open."""

    def __init__(self, database: object) -> None:
        if _in_a_bare_thread():
            super().__init__(
                f"No session of {database} in this thread: it was started without the context of "
                "a request, as `run_in_executor` and `threading.Thread` do. Start it with "
                "`asyncio.to_thread`, or open `database.begin()` in it."
            )
        else:
            super().__init__(
                f"No session of {database} here: no DBSessionMiddleware that has it is around "
                "this code. Outside of a request use `database.begin()`; inside of one, add "
                "DBSessionMiddleware with this very database to the application, further out "
                "than whatever needs a session."
            )


class SessionClosed(DBSessionError, RuntimeError):
    """A session was used after its unit of work had ended."""

    def __init__(self, database: object) -> None:
        super().__init__(
            f"The request that this session of {database} belongs to is over: a task or a stored "
            "reference outlived it. Work that goes on longer than its request opens a unit "
            "of work of its own with `database.begin()`."
        )


class PrematureClose(DBSessionError, RuntimeError):
    """The application closed a session that had work to commit."""

    def __init__(self, database: object) -> None:
        super().__init__(
            f"Closing this session of {database} would discard what was done on it: it is closed "
            "when its unit of work ends. Leave out `close()` and `async with session:`; to give "
            "its connection back early, or to discard, call `commit()` or `rollback()`."
        )


class ConcurrentUse(DBSessionError, RuntimeError):
    """Two tasks (or threads) used one session at the same time."""

    def __init__(self, database: object) -> None:
        super().__init__(
            f"Another task is in the middle of an operation on this session of {database}, and a "
            "session does one thing at a time. Await one after the other, or open "
            "`database.begin()` in each task."
        )


class DatabaseNotRunning(DBSessionError, RuntimeError):
    """A database was used before it was started, after it was stopped, or in another event loop."""

    def __init__(self, database: object, *, other_loop: bool = False) -> None:
        if other_loop:
            super().__init__(
                f"{database} was started in another event loop, and its connections belong there. "
                "Start it in the loop that uses it: leave it to the lifespan of the server, write "
                "`async with database:` inside the function given to `asyncio.run`, and in an "
                "async test use httpx's `ASGITransport`, for TestClient brings a loop of its own. "
                "An engine of yours that several loops use needs `poolclass=NullPool`."
            )
        else:
            super().__init__(
                f"{database} is not running: no lifespan startup reached a DBSessionMiddleware "
                "that has it. Let one be sent (`uvicorn --lifespan on`, `with TestClient(app):`, "
                "asgi-lifespan's `LifespanManager` around httpx's `ASGITransport`), write "
                f"{_ways_to_start(database)}, give it to the outermost DBSessionMiddleware too "
                "(below a mount or on a single route), or, where the server sends none (daphne), "
                f"use `{type(database).__name__}.from_engine(engine)`."
            )


class DatabaseUnavailable(DBSessionError, ConnectionError):
    """The database did not answer."""

    def __init__(
        self,
        database: object,
        reason: str,
        advice: str = "Is it running, and are host, port, name and credentials right?",
    ) -> None:
        super().__init__(f"{database} cannot be reached: {reason}. {advice}")


class TransactionAborted(DBSessionError, PendingRollbackError):
    """COMMIT was refused because all or half of the work would silently have been lost.

    PostgreSQL aborts a transaction at the first statement that fails, and then answers COMMIT
    with a ROLLBACK that drivers report as success. MySQL and MariaDB roll back at a deadlock, and
    what follows is another transaction: COMMIT would store the second half of the work alone.
    Source: https://www.postgresql.org/docs/current/sql-commit.html
    """

    def __init__(self, database: object, reason: str, *, undone: bool = False) -> None:
        if undone:
            super().__init__(
                f"The transaction on {database} was rolled back by the database at an error that "
                f"the application swallowed ({reason}); COMMIT would store only what came after "
                "it. Let the error rise, or call `rollback()` and do the whole work again."
            )
            return
        super().__init__(
            f"The transaction on {database} was aborted by an error that the application "
            f"swallowed ({reason}); COMMIT would store nothing. Put the statement that may fail "
            "into `async with session.begin_nested():`, or let its error rise."
        )


class ConfigurationError(DBSessionError, ValueError):
    """The package was configured in a way that cannot work; the message says what to write."""


def _restore_error(
    error_class: type[DBSessionError], arguments: tuple[object, ...]
) -> DBSessionError:
    error = error_class.__new__(error_class)
    error.args = arguments
    return error


def _ways_to_start(database: object) -> str:
    if hasattr(database, "__enter__"):
        return "`with database:` (in a coroutine `async with database:`)"
    return "`async with database:`"


def _in_a_bare_thread() -> bool:
    if threading.current_thread() is threading.main_thread():
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


class Unwound(BaseException):
    """Unwinds the application whose response must not be sent: its COMMIT failed, say.

    Not an `Exception`: no handler of the application's may take it for an error of its own, and
    answer it. The middleware turns it back into what it stands for.
    """


# What it may have become on its way out, through frameworks and task groups.
UNWOUND = (Unwound, Exception, BaseExceptionGroup)
