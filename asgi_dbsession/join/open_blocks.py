"""Refuses code outside of an open `begin(join=True)` block, while the block uses the session."""

from typing import Any

from sqlalchemy.orm import Session, SessionTransaction

from asgi_dbsession.errors import ConcurrentUse, SessionClosed
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.unit.unit_of_work import SessionSource, UnitOfWork, current_unit


class OpenBlocks:
    """The `begin(join=True)` blocks of one session that are open now. The innermost block is last.

    Only code inside the innermost block may use the session. Work of any other code would be inside
    the block's savepoint too, and a rollback of the block would undo this work.

    Args:
        unit: The unit of work whose session the blocks use.
        database: The database of the session.
        opened: The session.
    """

    def __init__(
        self, unit: UnitOfWork, database: SessionSource[Any], opened: ManagedSession[Any]
    ) -> None:
        self.open: list[UnitOfWork] = []
        self._unit = unit
        self._database = database
        self._writes = opened.companion.writes
        self._followers = opened.companion.followers

    def __call__(self) -> None:
        """Raise an error if the caller is not inside the innermost `begin(join=True)` block.

        Raises:
            ConcurrentUse: The caller runs outside of the innermost `begin(join=True)` block.
            SessionClosed: The caller was started inside a `begin(join=True)` block that has ended.
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
        """Mark a `begin(join=True)` block as closed, and also the open blocks inside of it.

        Returns:
            True if no block inside this block was still open.
        """
        number = self.open.index(unit)
        for each in self.open[number:]:
            each.closed = True
        is_innermost = number == len(self.open) - 1
        del self.open[number:]
        return is_innermost

    def forbid_writes(self) -> None:
        """Refuse writes of the session in the savepoint that has begun just now."""
        self._writes.forbidden = self._writes.in_block = True
        self._followers.append(self)

    def allow_writes(self) -> None:
        """Allow writes again if no open block, and not the outer unit of work, may only read."""
        if self._writes.forbidden and not any(each.read_only for each in (self._unit, *self.open)):
            self._writes.forbidden = self._writes.in_block = False
            self._writes.refused = None
            self._followers.remove(self)

    def record_commit(self, _session: Session) -> None:
        """Called after a COMMIT inside a read-only block: make the next transaction read-only.

        The savepoint of the `begin(join=True, read_only=True)` block was read-only. The COMMIT has
        ended this savepoint, so the whole next transaction must be read-only.
        """
        self._writes.in_block = False

    def record_rollback(self, transaction: SessionTransaction) -> None:
        """Called after a ROLLBACK inside a read-only block: make the next transaction read-only.

        A rollback to a savepoint changes nothing here, because the transaction around the
        `begin(join=True, read_only=True)` block goes on.
        """
        if transaction.parent is None:
            self._writes.in_block = False
