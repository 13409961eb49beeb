"""The names that the core shares with `optional/read_only/`: sessions that may only read."""

from typing import Protocol

from sqlalchemy import Connection
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import Session

from asgi_dbsession.errors import ForbiddenWrite

ON_MARIADB, ON_POSTGRESQL = "START TRANSACTION READ ONLY", "SET TRANSACTION READ ONLY"
# These statements make a transaction read-only. Reports do not count them as statements of the
# application.
PARTS_OF_BEGIN = frozenset((ON_MARIADB, ON_POSTGRESQL))
# `connection.info` has this key while the connection belongs to a session that may only read. The
# value is the `ReadOnlySession` object of this session.
KEY = "asgi_dbsession.read_only"


class ReadOnlySession(Protocol):
    """The methods of the class `Refusals` that the core calls."""

    @property
    def covers_transaction(self) -> bool:
        """True if the transaction is read-only as a whole, and not only one of its savepoints."""
        ...

    def begin(self, connection: Connection, *, in_savepoint: bool, is_shared: bool) -> None:
        """Called when a transaction or savepoint of the session has begun."""

    def check_statement(self, statement: object) -> None:
        """Called before each statement. Raise `ForbiddenWrite` if the statement writes."""

    def check_flush(self, session: Session) -> None:
        """Called before each flush. Raise `ForbiddenWrite` if objects were changed."""

    def refuse(self, name: str) -> ForbiddenWrite:
        """Return the error for a refused write. COMMIT will raise this error again."""
        ...

    def record_refusal(self, context: ExceptionContext) -> None:
        """Called when a statement has failed. Remember it if the database refused a write."""


def may_only_read(connection: Connection) -> bool:
    """Return True if the transaction on the connection is read-only as a whole."""
    read_only: ReadOnlySession | None = connection.info.get(KEY)
    return read_only is not None and read_only.covers_transaction
