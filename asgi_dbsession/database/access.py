"""The session of the default database, from anywhere below the middleware."""

from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from asgi_dbsession.errors import ConfigurationError, NoSession
from asgi_dbsession.unit.current import unit_that_manages
from asgi_dbsession.unit.unit_of_work import UnitOfWork, current_unit

from .async_database import AsyncDatabase
from .sync_database import SyncDatabase

D = TypeVar("D", AsyncDatabase[Any], SyncDatabase[Any])


def get_session() -> AsyncSession:
    """The session of the default database: the first `AsyncDatabase` of the current unit of work.

    Opened on first use; its connection is checked out by the first statement. It is valid
    until the request (or the `begin()`) ends, and then closed for good. One task at a time may
    use it: tasks that run at once open `database.begin()` each.

    Raises:
        NoSession: Not inside a request that `DBSessionMiddleware` serves, nor inside `begin()`.
        SessionClosed: The request that this task belongs to is over.
        DatabaseNotRunning: The database has not been started.
        ConfigurationError: There are only sync databases here.
    """
    unit, database = _default(AsyncDatabase, "`get_sync_session()` in a `def` function")
    session: AsyncSession = unit.open(database)
    return session


def get_sync_session() -> Session:
    """The same for the first `SyncDatabase`: for handlers written with `def`."""
    unit, database = _default(SyncDatabase, "`get_session()` in an `async def` function")
    session: Session = unit.open(database)
    return session


async def session_dependency() -> AsyncSession:
    """`get_session` for injectors: `Annotated[AsyncSession, Depends(session_dependency)]`.

    See `AsyncDatabase.session_dependency` for why it is what it is.
    """
    return get_session()


def _default(kind: type[D], instead: str) -> tuple[UnitOfWork, D]:
    unit = innermost = current_unit.get()
    while unit is not None:
        for database in unit.databases:
            if isinstance(database, kind):
                if unit.joins and not unit.manages(database):
                    return unit_that_manages(database), database
                return unit, database
        unit = unit.enclosing
    if innermost is None:
        raise NoSession("the default database")
    raise ConfigurationError(
        f"There is no {kind.__name__} here, only {innermost.databases[0]}. "
        f"Use {instead}, or give DBSessionMiddleware an object of the class {kind.__name__} too."
    )
