"""The errors of this package. Each error text says where and what happened, and what to do."""

import asyncio
import threading
from contextvars import copy_context
from typing import Any

from sqlalchemy import URL
from sqlalchemy.exc import PendingRollbackError


class DBSessionError(Exception):
    """The base class of every error that this package raises itself.

    Errors of SQLAlchemy and of the driver are not wrapped: the application gets them unchanged.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Let `pickle` and `copy` make the same error again, with the same text.

        By default, they would call the class with the whole error text. But the class takes other
        arguments, such as the database, and makes the text itself.
        """
        return type(self).__new__, (type(self),), {**vars(self), "args": self.args}


class NoSession(DBSessionError, LookupError):
    """A session was requested outside of a request or `begin()` block that uses its database."""

    def __init__(self, database: object) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        has_loop = asyncio._get_running_loop() is not None
        # Frameworks run `def` handlers in threads too, but with the context of the request.
        if not is_main and not has_loop and not copy_context():
            super().__init__(
                f"There is no session of {database} in this thread, because the thread was started "
                "without the context of a request (`run_in_executor`, `threading.Thread`). With a "
                "SyncDatabase, start the thread with `asyncio.to_thread`, or open "
                "`database.begin()` in it. With an AsyncDatabase, call a coroutine that opens "
                "`database.begin()`: `asyncio.run_coroutine_threadsafe(coroutine, loop)`."
            )
        else:
            super().__init__(
                f"There is no session of {database} here, because no DBSessionMiddleware that "
                "serves this database wraps this code. Outside of a request, use "
                "`database.begin()`. Inside a request, give this same database object to a "
                "DBSessionMiddleware that wraps the code which needs the session."
            )


class SessionClosed(DBSessionError, RuntimeError):
    """A session was used after its request or `begin()` block had ended."""

    def __init__(self, database: object, *, of_block: bool = False) -> None:
        if of_block:
            super().__init__(
                f"The `begin(join=True)` on {database} that this code was started in has ended, "
                "and a task still works in it. Wait for the task inside of the block, or open "
                "`database.begin()` in the task."
            )
            return
        super().__init__(
            f"The request or `begin()` block that this session of {database} belongs to has ended; "
            "a task or a stored reference still uses the session. For later work, open "
            "`database.begin()` in the code that does the work."
        )


class PrematureClose(DBSessionError, RuntimeError):
    """The application closed a session that still had work to commit."""

    def __init__(self, database: object) -> None:
        super().__init__(
            f"Closing this session of {database} would discard its uncommitted work. The session "
            "is closed for you when its unit of work ends, so leave out `close()` and `async with "
            "session:`. To release its connection early or to discard the work, call `commit()` or "
            "`rollback()`."
        )


class ConcurrentUse(DBSessionError, RuntimeError):
    """Two tasks or threads used one session at the same time, or have work in one transaction.

    Args:
        database: The database of the session.
        mixed_with: Which other work is in the same transaction. "living": work of a task that is
            still running. "failed": work of a task that raised an exception. "block": work of a
            `begin(join=True)` block. None if two operations ran at the same time.
    """

    def __init__(self, database: object, *, mixed_with: str | None = None) -> None:
        texts = {
            None: (
                f"Another task is in the middle of an operation on this session of {database}, and "
                "a session does one thing at a time."
            ),
            "living": (
                f"Another task has uncommitted work on this session of {database}, in the same "
                "transaction as the work of the task that sends. Nothing was sent, and nothing "
                "was stored."
            ),
            "block": (
                f"Another task is inside of `begin(join=True)` on this session of {database}. "
                "Work of this task would be kept or rolled back together with that block."
            ),
            "failed": (
                f"A task that has failed left uncommitted work on this session of {database}, in "
                "the same transaction as work that should be committed. All of it is rolled back."
            ),
        }
        super().__init__(f"{texts[mixed_with]} Open `database.begin()` in each task.")


class DatabaseNotRunning(DBSessionError, RuntimeError):
    """A database was used before its start, after its shutdown, or in another event loop."""

    def __init__(self, database: object, *, other_loop: bool = False) -> None:
        if other_loop:
            super().__init__(
                f"{database} was started in another event loop, and its connections belong to that "
                "loop. Start it in the loop that uses it: by the lifespan of the server, or with "
                "`async with database:` inside the function given to `asyncio.run`. In an async "
                "test use httpx's `ASGITransport`, because TestClient has a loop of its own. "
                "An engine of yours that several loops use needs `poolclass=NullPool`."
            )
        else:
            super().__init__(
                f"{database} is not running. It starts when a DBSessionMiddleware that serves it "
                "gets the lifespan startup of the server (`uvicorn --lifespan on`). In a test, "
                "write `with TestClient(app):`, or use asgi-lifespan's `LifespanManager` around "
                "httpx's `ASGITransport`. In a test or a script, you can also write `async with "
                "database:` (with a SyncDatabase also `with database:`). In a mounted application "
                "or on a single route, give the database to the outermost DBSessionMiddleware too. "
                "If the server sends no lifespan (daphne), use "
                f"`{type(database).__name__}.from_engine(engine)`."
            )


class DatabaseUnavailable(DBSessionError, ConnectionError):
    """The database did not answer, for example at startup."""

    def __init__(self, database: object, reason: str, advice: str | None = None) -> None:
        advice = advice or "Is it running, and are host, port, name, user and password right?"
        super().__init__(f"{database} cannot be reached: {reason}. {advice}")


class TransactionAborted(DBSessionError, PendingRollbackError):
    """COMMIT was refused, because it would have lost work of the transaction without an error.

    PostgreSQL aborts a transaction when a statement fails. At COMMIT, PostgreSQL then rolls back,
    and the drivers report success. MySQL and MariaDB roll back the transaction at a deadlock, and
    SQLite at `INSERT OR ROLLBACK`. The next statement begins a new transaction, and COMMIT would
    store only the work after the error. Source:
    https://www.postgresql.org/docs/current/sql-commit.html
    """

    def __init__(self, database: object, reason: str, *, rolled_back: bool = False) -> None:
        if rolled_back:
            super().__init__(
                f"The database rolled back the transaction on {database} because of an error that "
                f"the application caught ({reason}). COMMIT would store only the work after it. "
                "Do not catch the error, or call `rollback()` and do the whole work again."
            )
            return
        super().__init__(
            f"An error that the application caught ({reason}) aborted the transaction on "
            f"{database}. COMMIT would store nothing. Put the statement that may fail into "
            "`async with session.begin_nested():`, or do not catch its error."
        )


class ForbiddenWrite(DBSessionError, RuntimeError):
    """A unit of work that may only read tried to write. Nothing was stored.

    If the application catches this error, COMMIT raises it again.
    """

    def __init__(self, database: object, what: str) -> None:
        super().__init__(
            f"This unit of work may only read {database}, so {what} was refused. To write, "
            "open `database.begin()`, or change `read_only` where the unit of work begins (in "
            "DBSessionMiddleware, or in `begin`). To change an object in memory only, call "
            "`session.expunge(object)` first."
        )


class ConfigurationError(DBSessionError, ValueError):
    """The package was configured in a way that cannot work. The error text says what to write."""


class AbortRequest(BaseException):
    """Stops the application if its response must not be sent, for example after a failed COMMIT.

    This class is not a subclass of `Exception`, so that no exception handler of the application
    catches it and sends a response. The middleware catches this exception. Then the middleware
    raises the error of the COMMIT, which the unit of work has stored, or sends the response of
    `on_commit_error`.
    """


# Catch all these classes to catch AbortRequest: a framework may replace AbortRequest by another
# exception, and a task group may wrap AbortRequest in an exception group.
ABORTED = (AbortRequest, Exception, BaseExceptionGroup)


def without_secrets(url: URL) -> str:
    """Return a URL for logs and error texts, without its password and without its options."""
    # If the colon before the password is written as `%3A`, SQLAlchemy takes the password for a part
    # of the user name. Separate the two here, so that the password is hidden.
    if url.username and ":" in url.username:
        user, _, password = url.username.partition(":")
        url = url.set(username=user, password=password)
    return url.set(query={}).render_as_string(hide_password=True)


def kind_of(given: object) -> str:
    """For an error text, describe a wrong argument by its type: its value may be a secret."""
    if isinstance(given, type):
        return f"the class {given.__name__}"
    return f"something of type {type(given).__name__}"


def name_of(function: object) -> str:
    """Return the name of a function. Arguments of a `partial` are left out: they may be secret."""
    inner = getattr(function, "func", function)
    return getattr(inner, "__qualname__", type(inner).__name__)
