"""The `database.begin(join=True)` block, a savepoint in the session of the outer unit of work."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

from sqlalchemy.orm import SessionTransaction
from sqlalchemy.util import greenlet_spawn

from asgi_dbsession.errors import ConcurrentUse, NoSession, SessionClosed
from asgi_dbsession.session.completion import run_to_completion
from asgi_dbsession.session.end import End
from asgi_dbsession.session.failures import forbid_commit
from asgi_dbsession.session.roll_back import with_outer
from asgi_dbsession.unit.current import current_unit, made_current, unit_that_manages
from asgi_dbsession.unit.unit_of_work import SessionSource, UnitOfWork

from .open_blocks import OpenBlocks

S = TypeVar("S")


def unit_to_join(database: SessionSource[Any]) -> UnitOfWork | None:
    """Return the open unit of work that a `begin(join=True)` block must join, or None."""
    with suppress(NoSession, SessionClosed):
        unit = unit_that_manages(database)
        return None if unit.closed else unit
    return None


@asynccontextmanager
async def joined(unit: UnitOfWork, database: SessionSource[S], read_only: bool) -> AsyncIterator[S]:
    """Implements `async with database.begin(join=True)`, as a savepoint.

    Even if the task is cancelled, the savepoint is either released or rolled back.
    """
    session = unit.open(database)
    block = _Block(unit, database, read_only)
    await greenlet_spawn(block.begin)
    with made_current(block.unit):
        try:
            yield session
        except BaseException as error:
            ending = greenlet_spawn(block.end, End(commit=False, reason="exception"), error)
            await run_to_completion(ending)
            raise
        ending = greenlet_spawn(block.end, End(commit=True, reason="exception"), None)
        await run_to_completion(ending)


@contextmanager
def joined_blocking(unit: UnitOfWork, database: SessionSource[S], read_only: bool) -> Iterator[S]:
    """Implements `with database.begin(join=True)` of a `SyncDatabase`, as a savepoint."""
    session = unit.open(database)
    block = _Block(unit, database, read_only)
    block.begin()
    with made_current(block.unit):
        try:
            yield session
        except BaseException as error:
            block.end(End(commit=False, reason="exception"), error)
            raise
        block.end(End(commit=True, reason="exception"), None)


class _Block:
    """One `begin(join=True)` block: a savepoint in the transaction of the outer unit of work.

    Attributes:
        unit: The unit of work that is current inside the block. It uses the session of the outer
            unit of work.
    """

    _savepoint: SessionTransaction

    def __init__(self, joined: UnitOfWork, database: SessionSource[Any], read_only: bool) -> None:
        self.unit = UnitOfWork((database,), joined.scope, current_unit.get())
        self.unit.joins_outer_unit, self.unit.joined = True, joined
        self.unit.is_blocking = joined.is_blocking
        self._database = database
        self._opened = joined.sessions[database]
        self._companion = self._opened.companion
        self._forbids_writes = read_only
        admit = self._opened.lock.admit
        if not isinstance(admit, OpenBlocks):
            admit = OpenBlocks(joined, database, self._opened)
        self._blocks = admit

    def begin(self) -> None:
        """Begin the savepoint of the `begin(join=True)` block."""
        lock = self._opened.lock
        is_outermost = lock.acquire()
        try:
            # `begin_nested` first flushes changes that were made before the `begin(join=True)`
            # block. So these changes are outside of the block's savepoint, and a rollback of the
            # block keeps these changes.
            self._savepoint = self._opened.orm.begin_nested()
            self._forbids_writes = self._forbids_writes and self._companion.read_only is None
            if self._forbids_writes:
                self._blocks.forbid_writes()
            self.unit.read_only = self._companion.read_only is not None
            self._blocks.open.append(self.unit)
            lock.admit = self._blocks
        finally:
            if is_outermost:
                lock.release()

    def end(self, end: End, error: BaseException | None) -> None:
        """Release the savepoint of the block, or roll back to it if the block had an error.

        Raises:
            ConcurrentUse: An inner `begin(join=True)` block is still open.
            SessionClosed: The outer unit of work or block has ended already.
            Exception: The error of the flush.
        """
        lock = self._opened.lock
        try:
            lock.acquire_for_end(end, of_block=True)
        except SessionClosed:
            if error is None:
                raise
            # The outer unit of work has ended before this `begin(join=True)` block, and has
            # committed or rolled back the work of the block too.
            return
        was_closed = self.unit.closed
        try:
            if was_closed:
                if error is None:
                    raise SessionClosed(self._database, of_block=True)
            elif not self._blocks.close(self.unit) and error is None:
                self._roll_back()
                raise ConcurrentUse(self._database, mixed_with="block")
            elif error is None:
                self._release()
            else:
                self._roll_back()
        finally:
            self._blocks.allow_writes()
            lock.release()

    def _release(self) -> None:
        try:
            if self._is_open:
                self._savepoint.commit()
            # In the read-only `begin(join=True)` block, the application has called `commit()`, and
            # later statements have begun a new transaction, which is read-only too. Roll it back.
            # Otherwise the outer unit of work could not write afterwards.
            elif self._forbids_writes:
                self._opened.orm.flush()
                self._opened.orm.rollback()
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        try:
            if self._is_open:
                self._savepoint.rollback()
            # In the `begin(join=True)` block, the application has called `commit()`, so there is no
            # savepoint any more. Later statements have begun a new transaction. Roll it back as a
            # whole, because all its work was done in the block.
            else:
                self._opened.orm.rollback()
        except Exception as failure:
            # The rollback to the savepoint failed (after a deadlock, MariaDB has no savepoint). So
            # forbid the COMMIT of the outer unit of work, which would store only a part.
            forbid_commit(self._companion.open_connections, failure)

    @property
    def _is_open(self) -> bool:
        return self._savepoint in with_outer(self._opened.orm.get_nested_transaction())
