"""Refuses the writes of a session that may only read."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, inspect
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.dml import UpdateBase

from asgi_dbsession.errors import ForbiddenWrite
from asgi_dbsession.session._sqlalchemy import on_checkin
from asgi_dbsession.session.companion import Companion
from asgi_dbsession.session.read_only import KEY

from .transaction import begin_read_only, is_refusal, set_savepoint_read_only


class Refusals:
    """Refuses the writes of a session that may only read, and remembers the first refused write.

    Args:
        in_block: True for a `begin(join=True, read_only=True)` block: only its savepoint is
            read-only.

    Attributes:
        forbidden: False after the end of a read-only block, when the session may write again.
    """

    def __init__(self, companion: Companion, *, in_block: bool = False) -> None:
        self._companion = companion
        self.in_block: bool = in_block
        self.forbidden: bool = True

    @property
    def covers_transaction(self) -> bool:
        """True if the whole transaction may only read. False if only a savepoint may only read."""
        return self.forbidden and not self.in_block

    def check_statement(self, statement: object) -> None:
        """Raise an error for an INSERT, UPDATE, DELETE or DDL statement of a read-only session.

        Only statement objects of SQLAlchemy are checked. SQL text that writes is refused by the
        database itself, because the session's transaction is read-only.

        Raises:
            ForbiddenWrite: The statement writes.
        """
        if isinstance(statement, UpdateBase | ExecutableDDLElement):
            raise self.refuse(_name_statement(statement))

    def check_flush(self, session: Session) -> None:
        """Raise an error if a flush would write added, changed or deleted objects.

        Raises:
            ForbiddenWrite: The session has such objects.
        """
        if (name := next(_names_of_objects(session), None)) is not None:
            raise self.refuse(name)

    def begin(self, connection: Connection, *, in_savepoint: bool, is_shared: bool) -> None:
        """Make a transaction or savepoint read-only, at once after it has begun.

        Args:
            connection: The connection of the session.
            in_savepoint: True if a savepoint has begun, False if a transaction has begun.
            is_shared: True inside `testing.rolled_back()`. Its connections refuse the writes
                themselves, so nothing is sent to the database here.
        """
        if in_savepoint is not self.in_block:
            return
        info = connection.info
        info[KEY] = self
        on_checkin(connection, lambda _: info.pop(KEY, None))
        if is_shared:
            return
        if in_savepoint:
            set_savepoint_read_only(connection)
        else:
            begin_read_only(connection)

    def record_commit(self, _session: Session) -> None:
        """Called after a COMMIT inside a read-only block: make the next transaction read-only.

        The savepoint of the `begin(join=True, read_only=True)` block was read-only. The COMMIT has
        ended this savepoint, so the whole next transaction must be read-only.
        """
        self.in_block = False

    def record_rollback(self, transaction: SessionTransaction) -> None:
        """Called after a ROLLBACK inside a read-only block: make the next transaction read-only.

        The savepoint of the `begin(join=True, read_only=True)` block was read-only. The ROLLBACK
        has ended this savepoint, so the whole next transaction must be read-only. After a rollback
        to a savepoint, do nothing: the transaction and the block's savepoint are still open.
        """
        if transaction.parent is None:
            self.in_block = False

    def refuse(self, name: str) -> ForbiddenWrite:
        """Return the error for a refused write. COMMIT will raise the first such error again."""
        error = ForbiddenWrite(self._companion.lock.database, name)
        self._companion.refused = self._companion.refused or error
        return error

    def record_refusal(self, context: ExceptionContext) -> None:
        """If a statement failed because the database refused a write, remember this write."""
        error = context.original_exception
        if self.forbidden and is_refusal(error):
            refusal = self.refuse(f"the statement {str(context.statement).split()[0]}…")
            refusal.__cause__ = context.sqlalchemy_exception or error
            refusal.__cause__.add_note(str(refusal))


def _names_of_objects(session: Session) -> Iterator[str]:
    for each in session.new:
        yield f"an object of class {type(each).__name__} (new)"
    for each in session.deleted:
        yield f"an object of class {type(each).__name__} (deleted)"
    for each in session.dirty:
        if session.is_modified(each):
            attributes = inspect(each).attrs
            names = ", ".join(found.key for found in attributes if found.history.has_changes())
            yield f"an object of class {type(each).__name__} (changed: {names})"


def _name_statement(statement: Any) -> str:
    kind = str(statement.__visit_name__).replace("_", " ").upper()
    table = getattr(statement, "table", None)
    name = getattr(table, "name", None)
    return f"the statement {kind} ({name})" if name else f"the statement {kind}"
