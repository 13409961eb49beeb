"""The `database.begin()` blocks: each opens a new unit of work or joins an open one."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from asgi_dbsession.session.completion import complete_here
from asgi_dbsession.session.end import current_end

from .current import current_unit, made_current
from .ending import close
from .unit_of_work import SessionSource, UnitOfWork

S = TypeVar("S")


@asynccontextmanager
async def block_of(database: SessionSource[S], join: bool, read_only: bool) -> AsyncIterator[S]:
    """Implements `async with database.begin() as session`."""
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
            unit.lost_work = unit.may_have_written
            await close(unit, commit=False, error=error)
            raise
        await close(unit, commit=not unit.rollback)


@contextmanager
def blocking_block_of(database: SessionSource[S], join: bool, read_only: bool) -> Iterator[S]:
    """Implements `with database.begin() as session` of a `SyncDatabase`."""
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
            unit.lost_work = unit.may_have_written
            complete_here(close(unit, commit=False, error=error))
            raise
        complete_here(close(unit, commit=not unit.rollback))


@contextmanager
def _unit_of_its_own(database: SessionSource[Any], read_only: bool) -> Iterator[UnitOfWork]:
    """Open a unit of work for one database. It is the current one in the `with` block.

    The code inside the `with` block must commit or roll back the unit of work, and close it.
    """
    around = current_unit.get()
    unit = around.within((database,)) if around is not None else UnitOfWork((database,), None, None)
    unit.read_only = read_only
    # Forget closed outer requests and `begin()` blocks, to free memory. Skip this if a listener
    # calls `begin()` during a commit (`current_end` is set then). In its last commit, a request is
    # marked as closed already, but still in use.
    if not current_end.get():
        _forget_unreachable(unit)
    with made_current(unit):
        yield unit


def _forget_unreachable(unit: UnitOfWork) -> None:
    """Remove closed outer units of work that `get_session()` can no longer reach.

    Otherwise, if each job starts the next one inside its `begin()` block, the units of work of all
    earlier jobs stay in memory.
    """
    of_inner = set(unit.databases)
    while (enclosing := unit.enclosing) is not None:
        # Remove the outer unit of work `enclosing` if it is closed, and if the inner ones have all
        # its databases. `get_session()` asks the inner ones first, so it never asks `enclosing`.
        if enclosing.closed and of_inner.issuperset(enclosing.databases):
            unit.enclosing = enclosing.enclosing
        else:
            of_inner = {*enclosing.databases, *(of_inner if enclosing.closed else ())}
            unit = enclosing
