"""The current unit of work, and the functions that return its sessions."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from asgi_dbsession.errors import ConfigurationError, NoSession, SessionClosed

from .unit_of_work import SessionSource, UnitOfWork

current_unit: ContextVar[UnitOfWork | None] = ContextVar("asgi_dbsession", default=None)


@contextmanager
def made_current(unit: UnitOfWork) -> Iterator[None]:
    """In the `with` block, make `unit` the current unit of work, which `get_session()` uses."""
    around = current_unit.get()
    was_closed = around is not None and around.closed
    try:
        current_unit.set(unit)
        yield
    finally:
        # Make the outer unit of work current again, but only if `unit` is current now. Otherwise
        # the application has opened a `begin()` block inside of `unit` and not closed it yet (in a
        # generator). Such a block stays current until it ends.
        if current_unit.get() is unit:
            current_unit.set(around if was_closed else _nearest_open(around))


def unit_that_manages(database: SessionSource[Any]) -> UnitOfWork:
    """Return the innermost request or `begin()` block that has a session of its own for `database`.

    Skip a `begin(join=True)` block or an inner DBSessionMiddleware that uses an outer session.

    Raises:
        NoSession: No request or `begin()` block with this database is around the calling code.
        SessionClosed: This task was started in a `begin(join=True)` block that has ended.
    """
    innermost = current_unit.get()
    for unit in innermost.chain() if innermost is not None else ():
        if unit.joined is not None and unit.closed and database in unit.databases:
            raise SessionClosed(database, of_block=True)
        if unit.manages(database):
            return unit
    raise NoSession(database)


def get_session() -> AsyncSession:
    """Return the session of the default database: the first `AsyncDatabase` of the unit of work.

    The session is opened on first use, and its first statement checks out a connection. When the
    request or the `begin()` block ends, the session is closed permanently. Only one task at a time
    may use the session. Parallel tasks must each open `database.begin()`.

    Raises:
        NoSession: The calling code runs outside of `DBSessionMiddleware` and of `begin()` blocks.
        SessionClosed: The request that started this task has ended.
        DatabaseNotRunning: The database has not been started.
        ConfigurationError: The unit of work has only sync databases.
    """
    session: AsyncSession = _default_session(is_async=True)
    return session


def get_sync_session() -> Session:
    """Return the session of the first `SyncDatabase` of the unit of work, for `def` functions.

    `get_session` documents how long the session is valid, and which errors are raised.
    """
    session: Session = _default_session(is_async=False)
    return session


async def session_dependency() -> AsyncSession:
    """Return the same session as `get_session()`; for `Depends(session_dependency)` in FastAPI.

    `AsyncDatabase.session_dependency` explains why this is a coroutine function without parameters.
    """
    return get_session()


def _default_session(*, is_async: bool) -> Any:
    innermost = current_unit.get()
    if innermost is None:
        raise NoSession("the default database")
    for unit in innermost.chain():
        for database in unit.databases:
            if database.is_async is is_async:
                return unit_that_manages(database).open(database)
    kind = "AsyncDatabase" if is_async else "SyncDatabase"
    other = "`get_sync_session()` in a `def`" if is_async else "`get_session()` in an `async def`"
    raise ConfigurationError(
        f"There is no {kind} here, only {innermost.databases[0]}. Use {other} function, or give "
        f"DBSessionMiddleware an object of the class {kind} too."
    )


def _nearest_open(unit: UnitOfWork | None) -> UnitOfWork | None:
    """Return the nearest unit of work that is open, or the outermost one if all are closed.

    If all are closed, code that uses the outermost one gets `SessionClosed`, which explains the
    mistake.
    """
    while unit is not None and unit.closed and unit.enclosing is not None:
        unit = unit.enclosing
    return unit
