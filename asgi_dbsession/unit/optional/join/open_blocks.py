"""Raises an error if code outside of an open `begin(join=True)` block uses the block's session."""

from typing import Any

from asgi_dbsession.errors import ConcurrentUse, SessionClosed
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.unit.current import current_unit
from asgi_dbsession.unit.unit_of_work import SessionSource, UnitOfWork


class OpenBlocks:
    """The open `begin(join=True)` blocks of one session.

    Only code inside the innermost block may use the session. A rollback of the block would undo the
    work of other code too.

    Attributes:
        open: The units of work of the open blocks. The innermost is last.
    """

    def __init__(
        self, unit: UnitOfWork, database: SessionSource[Any], opened: ManagedSession[Any]
    ) -> None:
        self.open: list[UnitOfWork] = []
        self._unit = unit
        self._database = database
        self._companion = opened.companion
        # This object refuses writes while a block with `read_only=True` is open. None if no such
        # block is open. Also None if the outer unit of work is read-only: it refuses writes anyway.
        self._refusals: Any = None

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
        """Refuse writes of the session, in the savepoint that has just begun."""
        from asgi_dbsession.session.optional.read_only.refusals import Refusals

        self._refusals = self._companion.read_only = Refusals(self._companion, in_block=True)
        self._companion.followers.append(self._refusals)

    def allow_writes(self) -> None:
        """Let the session write again, after a read-only `begin(join=True)` block has ended.

        If the outer unit of work or a block that is still open may only read, do nothing.
        """
        refusals = self._refusals
        if refusals is None or any(each.read_only for each in (self._unit, *self.open)):
            return
        refusals.forbidden = False
        self._companion.followers.remove(refusals)
        self._companion.read_only = self._companion.refused = self._refusals = None
