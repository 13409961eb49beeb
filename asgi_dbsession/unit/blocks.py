"""The `database.begin()` blocks: each opens a new unit of work or joins an open one."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from .begin import unit_of_its_own
from .ending import close, close_blocking
from .unit_of_work import SessionSource

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
    with unit_of_its_own(database, read_only) as unit:
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
    with unit_of_its_own(database, read_only) as unit:
        unit.is_blocking = True
        try:
            yield unit.open(database)
        except BaseException as error:
            close_blocking(unit, commit=False, error=error)
            raise
        else:
            close_blocking(unit, commit=not unit.rollback)
