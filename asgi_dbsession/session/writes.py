"""Refuses the writes of a session that may only read."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, inspect
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import Session
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.dml import UpdateBase

from asgi_dbsession.errors import ForbiddenWrite, PrematureClose

from ._sqlalchemy import on_checkin
from .end import Reason, current_end
from .read_only import begin_read_only, is_refusal, set_savepoint_read_only

# `connection.info` has this key while the connection belongs to a session that may only read. The
# value is the `Writes` object of the session.
_KEY = "asgi_dbsession.writes"


class Writes:
    """Refuses the writes of a session that may only read, and remembers the first refused write.

    Args:
        database: The database of the session, for error texts.
        forbidden: True if the session may only read from the start.

    Attributes:
        forbidden: True if the session may only read now. The block `begin(join=True,
            read_only=True)` sets it to True until the block ends.
        in_block: True inside a `begin(join=True, read_only=True)` block. Then only the savepoint of
            the block is read-only, and the transaction outside of the block may write.
        refused: The error of the first refused write. The application may have caught this error,
            so COMMIT raises it again. Or the error for work that `close()` has discarded.
    """

    in_block: bool = False
    refused: ForbiddenWrite | PrematureClose | None = None

    def __init__(self, database: object, forbidden: bool) -> None:
        self._database = database
        self.forbidden: bool = forbidden

    def check_statement(self, statement: object) -> None:
        """Raise an error for an INSERT, UPDATE, DELETE or DDL statement built with SQLAlchemy.

        A statement that is given as SQL text is not checked here, because the database refuses it.
        Call this method only if `forbidden` is True.

        Raises:
            ForbiddenWrite: The statement writes.
        """
        if isinstance(statement, UpdateBase | ExecutableDDLElement):
            raise self.refuse(_name_statement(statement))

    def check_flush(self, session: Session) -> None:
        """Raise an error if a flush would write added, changed or deleted objects.

        Raises:
            ForbiddenWrite: The session may only read, and has such objects.
        """
        if self.forbidden and (name := next(_names_of_objects(session), None)) is not None:
            raise self.refuse(name)

    def check_commit(self) -> None:
        """Raise an error before COMMIT if a write was refused, or if work was discarded.

        Raises:
            ForbiddenWrite: A write was refused, and the application caught the error.
            PrematureClose: The application called `close()` while it handled an exception. This
                error is not raised if the application calls `commit()` itself.
        """
        if isinstance(self.refused, PrematureClose) and current_end.get() is None:
            self.refused = None
        if self.refused is not None:
            raise self.refused

    def begin(self, connection: Connection, *, in_savepoint: bool, is_shared: bool) -> None:
        """Make a transaction or savepoint read-only, at once after it has begun.

        Call this method only if `forbidden` is True.

        Args:
            connection: The connection of the session.
            in_savepoint: True if a savepoint has begun, False if a transaction has begun.
            is_shared: True inside `testing.rolled_back()`, which refuses the writes itself.
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

    def rolled_back(self, reason: Reason) -> None:
        """Forget the refused write, because the unit of work was rolled back.

        If the unit of work was rolled back because a task failed, keep the refused write. Other
        code may catch the exception of the task, and then COMMIT must still raise the error of the
        refused write.
        """
        if reason != "exception":
            self.refused = None

    def record_loss(self) -> None:
        """Record that `close()` discards work of the session."""
        self.refused = self.refused or PrematureClose(self._database)

    def refuse(self, name: str) -> ForbiddenWrite:
        """Return the error for a refused write. COMMIT will raise the first such error again."""
        error = ForbiddenWrite(self._database, name)
        self.refused = self.refused or error
        return error


def may_only_read(connection: Connection) -> bool:
    """Return True if the transaction on the connection is read-only as a whole."""
    writes: Writes | None = connection.info.get(_KEY)
    return writes is not None and writes.forbidden and not writes.in_block


def record_refusal(context: ExceptionContext) -> None:
    """If a statement failed because the transaction is read-only, remember the refused write."""
    connection, error = context.connection, context.original_exception
    writes: Writes | None = connection.info.get(_KEY) if connection is not None else None
    if writes is not None and writes.forbidden and is_refusal(error):
        refusal = writes.refuse(f"the statement {str(context.statement).split()[0]}…")
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
