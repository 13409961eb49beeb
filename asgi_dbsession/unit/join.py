"""The blocks of `database.begin(join=True)`, which join the unit of work around them."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from sqlalchemy.orm import SessionTransaction
from sqlalchemy.util import greenlet_spawn

from asgi_dbsession.errors import ConcurrentUse, SessionClosed
from asgi_dbsession.session.completion import run_to_completion
from asgi_dbsession.session.failures import forbid_commit
from asgi_dbsession.session.lock import End

from .begin import made_current
from .unit_of_work import SessionSource, UnitOfWork, current_unit

S = TypeVar("S")


def unit_to_join(database: SessionSource[Any]) -> UnitOfWork | None:
    """Return the open unit of work that a `begin(join=True)` block must join; None without one."""
    innermost = current_unit.get()
    for unit in innermost.chain() if innermost is not None else ():
        if unit.joined is not None and unit.closed and database in unit.databases:
            return None
        if unit.manages(database):
            return None if unit.closed else unit
    return None


@asynccontextmanager
async def joined(unit: UnitOfWork, database: SessionSource[S], read_only: bool) -> AsyncIterator[S]:
    """Run an `async with` block in a savepoint, which ends completely even after a cancellation."""
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
        else:
            ending = greenlet_spawn(block.end, End(commit=True, reason="exception"), None)
            await run_to_completion(ending)


@contextmanager
def joined_blocking(unit: UnitOfWork, database: SessionSource[S], read_only: bool) -> Iterator[S]:
    """Run a `with` block in a savepoint of the unit's session, on the current thread."""
    session = unit.open(database)
    block = _Block(unit, database, read_only)
    block.begin()
    with made_current(block.unit):
        try:
            yield session
        except BaseException as error:
            block.end(End(commit=False, reason="exception"), error)
            raise
        else:
            block.end(End(commit=True, reason="exception"), None)


class _Blocks:
    """The open `begin(join=True)` blocks of one session, the innermost last.

    Only the innermost block may use the session. Otherwise work of another task would be committed
    or rolled back together with the block.
    """

    def __init__(self, unit: UnitOfWork, database: SessionSource[Any]) -> None:
        self.open: list[UnitOfWork] = []
        self._unit = unit
        self._database = database

    def __call__(self) -> None:
        """Refuse a caller that is not inside the innermost block.

        Raises:
            ConcurrentUse: The caller is outside of the innermost block.
            SessionClosed: The caller was started inside a block that has ended.
        """
        innermost = current_unit.get()
        units = innermost.chain() if innermost is not None else ()
        mine = next(filter(self._is_block, units), None)
        if mine is not None and mine.closed:
            raise SessionClosed(self._database, of_block=True)
        if mine is not (self.open[-1] if self.open else None):
            raise ConcurrentUse(self._database, mixed_with="block")

    def _is_block(self, unit: UnitOfWork) -> bool:
        return unit.joined is self._unit and self._database in unit.databases

    def close(self, unit: UnitOfWork) -> bool:
        """Close a block, and all blocks that tasks have left open inside of this block.

        Returns:
            True if no blocks were open inside of the block.
        """
        number = self.open.index(unit)
        for each in self.open[number:]:
            each.closed = True
        is_innermost = number == len(self.open) - 1
        del self.open[number:]
        return is_innermost


class _Block:
    """One `begin(join=True)` block.

    Args:
        joined: The unit of work that the block joins.
        database: The database of the block; `joined` manages its session.
        read_only: True if the block may only read, even if the unit may write.

    Attributes:
        unit: The unit of work that is current inside the block. It has no sessions, and passes all
            calls to `joined`.
    """

    _savepoint: SessionTransaction

    def __init__(self, joined: UnitOfWork, database: SessionSource[Any], read_only: bool) -> None:
        self.unit = UnitOfWork((database,), joined.scope, current_unit.get())
        self.unit.joins_outer_unit, self.unit.joined = True, joined
        self.unit.is_blocking = joined.is_blocking
        self._database = database
        self._opened = joined.sessions[database]
        self._writes = self._opened.companion.writes
        self._forbids_writes = read_only
        admit = self._opened.lock.admit
        self._blocks = admit if isinstance(admit, _Blocks) else _Blocks(joined, database)

    def begin(self) -> None:
        """Begin the block's savepoint; SAVEPOINT is sent together with the first statement."""
        lock = self._opened.lock
        is_outermost = lock.acquire()
        try:
            # SQLAlchemy flushes earlier changes first, so a rollback of the block does not undo
            # them.
            self._savepoint = self._opened.orm.begin_nested()
            self._forbids_writes = self._forbids_writes and not self._writes.forbidden
            if self._forbids_writes:
                self._writes.forbidden = self._writes.in_block = True
                self._opened.companion.followers.append(self._writes)
            self.unit.read_only = self._writes.forbidden
            self._blocks.open.append(self.unit)
            lock.admit = self._blocks
        finally:
            if is_outermost:
                lock.release()

    def end(self, end: End, error: BaseException | None) -> None:
        """Release the block's savepoint or roll back to it, once the running operation has ended.

        Raises:
            ConcurrentUse: A task is still inside a block that it opened inside this block.
            SessionClosed: The unit, or a block around this block, ended before this block.
            Exception: The exception of the flush. The work of the block was rolled back.
        """
        lock = self._opened.lock
        try:
            lock.acquire_for_end(end, of_block=True)
        except SessionClosed:
            if error is None:
                raise
            # The unit of work ended before the block did, and has committed or rolled back the work
            # of the block.
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
            if self._writes.forbidden and not self._may_only_read:
                self._writes.allow()
                self._opened.companion.followers.remove(self._writes)
            lock.release()

    @property
    def _may_only_read(self) -> bool:
        """True if the unit, or a block that is still open, may only read."""
        unit = self.unit.joined
        return any(each.read_only for each in (unit, *self._blocks.open) if each is not None)

    def _release(self) -> None:
        try:
            self._writes.check_commit()
            if self._is_open:
                self._savepoint.commit()
            # The application committed inside the block, and its next transaction may only read.
            # End that transaction, because the outer unit may write.
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
            # The application committed inside the block, which ended the savepoint. Roll back all
            # work since that COMMIT, because the work belongs to the block.
            else:
                self._opened.orm.rollback()
        except Exception as failure:
            # The savepoint is lost: at a deadlock, MariaDB drops the savepoints. So refuse the
            # outer COMMIT, which would store only a part of the work.
            forbid_commit(self._opened.companion.open_connections, failure)

    @property
    def _is_open(self) -> bool:
        transaction = self._opened.orm.get_nested_transaction()
        while transaction is not None and transaction is not self._savepoint:
            transaction = transaction.parent
        return transaction is not None
