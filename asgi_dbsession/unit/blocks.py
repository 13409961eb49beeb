"""The `database.begin()` blocks: each opens a new unit of work or joins an open one."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from asgi_dbsession.session.end import current_end

from .current import current_unit, made_current
from .ending import close, close_blocking
from .unit_of_work import SessionSource, UnitOfWork

S = TypeVar("S")


@asynccontextmanager
async def block_of(database: SessionSource[S], join: bool, read_only: bool) -> AsyncIterator[S]:
    """Implements `async with database.begin()`; its value is a session."""
    if join:
        from .optional.join.block import joined, unit_to_join

        outer = unit_to_join(database)
        if outer is not None:
            async with joined(outer, database, read_only) as session:
                yield session
            return
    with _unit_of_its_own(database, read_only) as unit:
        try:
            yield unit.open(database)
        except BaseException as error:
            await close(unit, commit=False, error=error)
            raise
        else:
            await close(unit, commit=not unit.rollback)


@contextmanager
def blocking_block_of(database: SessionSource[S], join: bool, read_only: bool) -> Iterator[S]:
    """Implements `with database.begin()` of a `SyncDatabase`; its value is a session."""
    if join:
        from .optional.join.block import joined_blocking, unit_to_join

        outer = unit_to_join(database)
        if outer is not None:
            with joined_blocking(outer, database, read_only) as session:
                yield session
            return
    with _unit_of_its_own(database, read_only) as unit:
        unit.is_blocking = True
        try:
            yield unit.open(database)
        except BaseException as error:
            close_blocking(unit, commit=False, error=error)
            raise
        else:
            close_blocking(unit, commit=not unit.rollback)


@contextmanager
def _unit_of_its_own(database: SessionSource[Any], read_only: bool) -> Iterator[UnitOfWork]:
    """Open a unit of work for one database; it is the current unit of work in the `with` block.

    The code inside the `with` block must commit or roll back the unit of work, and close it.
    """
    around = current_unit.get()
    unit = around.within((database,)) if around is not None else UnitOfWork((database,), None, None)
    unit.read_only = read_only
    # A listener of the application may call `begin()` during the COMMIT of an outer unit of work.
    # The outer unit of work is marked as closed then, but the listener may still use the outer unit
    # of work. So remove no unit of work then.
    if not current_end.get():
        _forget_hidden(unit)
    with made_current(unit):
        yield unit


def _forget_hidden(unit: UnitOfWork) -> None:
    """Remove closed outer units of work that `get_session()` can no longer reach.

    `get_session()` searches from the inside to the outside. So it does not reach a closed unit of
    work if inner units of work have all of its databases. For example, each job may start the next
    job inside its own `begin()` block. Without this function, the units of work of all earlier jobs
    would stay in memory.
    """
    hidden = set(unit.databases)
    while (enclosing := unit.enclosing) is not None:
        if enclosing.closed and hidden.issuperset(enclosing.databases):
            unit.enclosing = enclosing.enclosing
        else:
            hidden = {*enclosing.databases, *(hidden if enclosing.closed else ())}
            unit = enclosing
