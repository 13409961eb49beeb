"""Refuses the writes of a session in a unit of work that may only read."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, inspect
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.dml import UpdateBase

from asgi_dbsession.errors import ForbiddenWrite

from ._sqlalchemy import on_checkin
from .lock import Reason
from .read_only import begin_read_only, is_refusal, set_savepoint_read_only

# The key of `connection.info` for the `Writes` object of the session that uses the connection.
_KEY = "asgi_dbsession.writes"


class Writes:
    """Refuses writes if a session may only read, and remembers the first refused write.

    Args:
        database: The database of the session, for error texts.
        forbidden: True if the session may only read.

    Attributes:
        forbidden: True if the session may only read now. A `begin(join=True, read_only=True)` block
            sets `forbidden` to True until the block ends.
        in_block: True inside such a block, where only the savepoint is read-only. The transaction
            around the savepoint may write.
        refused: The error of the first refused write. COMMIT raises this error again, because the
            application may have caught the error.
    """

    in_block: bool = False
    refused: ForbiddenWrite | None = None

    def __init__(self, database: object, forbidden: bool) -> None:
        self._database = database
        self.forbidden: bool = forbidden

    def check_statement(self, statement: object) -> None:
        """Refuse a SQLAlchemy construct that writes; the database refuses SQL text that writes.

        Call this method only if `forbidden` is True.

        Raises:
            ForbiddenWrite: The statement writes.
        """
        if isinstance(statement, UpdateBase | ExecutableDDLElement):
            raise self.refuse(_name_statement(statement))

    def check_flush(self, session: Session) -> None:
        """Refuse to flush added, changed or deleted objects.

        Raises:
            ForbiddenWrite: The session may only read.
        """
        if self.forbidden and (name := next(_names_of_objects(session), None)) is not None:
            raise self.refuse(name)

    def check_commit(self) -> None:
        """Refuse COMMIT if a write was refused before.

        Raises:
            ForbiddenWrite: A write was refused, and the application caught the error.
        """
        if self.refused is not None:
            raise self.refused

    def begin(self, connection: Connection, *, in_savepoint: bool, is_shared: bool) -> None:
        """Make the transaction or savepoint read-only that has just begun.

        Call this method only if `forbidden` is True.

        Args:
            connection: The connection of the session.
            in_savepoint: True if a savepoint has begun.
            is_shared: True inside `testing.rolled_back()`, where `testing` itself refuses writes.
        """
        if in_savepoint is not self.in_block:
            return
        info = connection.info
        info[_KEY] = self
        on_checkin(connection, lambda _: info.pop(_KEY, None))
        if is_shared:
            return
        if in_savepoint:
            set_savepoint_read_only(connection)
        else:
            begin_read_only(connection)

    def record_commit(self, _session: Session) -> None:
        """After COMMIT in a read-only block, refuse writes in the transactions that follow.

        COMMIT has ended the savepoint of the block, so a read-only savepoint is not enough.
        """
        self.in_block = False

    def record_rollback(self, transaction: SessionTransaction) -> None:
        """After ROLLBACK in a read-only block, refuse writes in the transactions that follow.

        After a rollback to a savepoint, do nothing.
        """
        if transaction.parent is None:
            self.in_block = False

    def rolled_back(self, reason: Reason) -> None:
        """Forget the refused write after the rollback of the unit of work.

        If the reason is an exception of a task, keep the refused write: other code may catch the
        exception, and nobody would see that a write was refused.
        """
        if reason != "exception":
            self.refused = None

    def allow(self) -> None:
        """Allow writes again at the end of a `begin(join=True, read_only=True)` block."""
        self.forbidden = self.in_block = False
        self.refused = None

    def refuse(self, name: str) -> ForbiddenWrite:
        """Return the error for a refused write, and remember the first error for COMMIT."""
        error = ForbiddenWrite(self._database, name)
        self.refused = self.refused or error
        return error


def may_only_read(connection: Connection) -> bool:
    """Return True if the whole transaction on the connection may only read."""
    writes: Writes | None = connection.info.get(_KEY)
    return writes is not None and writes.forbidden and not writes.in_block


def record_refusal(context: ExceptionContext) -> None:
    """Record that the database refused a statement because the session may only read."""
    connection, error = context.connection, context.original_exception
    writes: Writes | None = connection.info.get(_KEY) if connection is not None else None
    if writes is not None and writes.forbidden and is_refusal(error):
        words = (context.statement or "").split(maxsplit=1)
        refusal = writes.refuse(f"the statement {words[0] if words else ''}…")
        refusal.__cause__ = context.sqlalchemy_exception or error
        refusal.__cause__.add_note(str(refusal))


def _names_of_objects(session: Session) -> Iterator[str]:
    for each in session.new:
        yield f"an object of class {type(each).__name__} (new)"
    for each in session.deleted:
        yield f"an object of class {type(each).__name__} (deleted)"
    for each in session.dirty:
        if session.is_modified(each):
            changed = [one.key for one in inspect(each).attrs if one.history.has_changes()]
            names = ", ".join(changed)
            yield f"an object of class {type(each).__name__} (changed: {names})"


def _name_statement(statement: Any) -> str:
    kind = str(statement.__visit_name__).replace("_", " ").upper()
    table = getattr(statement, "table", None)
    name = getattr(table, "name", None)
    return f"the statement {kind} ({name})" if name else f"the statement {kind}"
