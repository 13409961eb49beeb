"""The interface of `optional/read_only/`, which refuses the writes of read-only sessions."""

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
    """The interface of the class `Refusals`, which refuses the writes of read-only sessions."""

    @property
    def covers_transaction(self) -> bool:
        """True if the whole transaction may only read. False if only a savepoint is read-only."""
        ...

    def begin(self, connection: Connection, *, in_savepoint: bool, is_shared: bool) -> None:
        """Called when a transaction or savepoint of the session has begun. Make it read-only."""

    def check_statement(self, statement: object) -> None:
        """Called before each statement. Raise `ForbiddenWrite` if the statement writes."""

    def check_flush(self, session: Session) -> None:
        """Called before each flush. Raise `ForbiddenWrite` if objects were changed."""

    def refuse(self, name: str) -> ForbiddenWrite:
        """Return the error for a refused write. COMMIT will raise this error again."""
        ...

    def record_refusal(self, context: ExceptionContext) -> None:
        """Called when a statement has failed. If the database refused a write, let COMMIT fail."""


def may_only_read(connection: Connection) -> bool:
    """Return True if the whole transaction of a connection may only read, not only a savepoint."""
    read_only: ReadOnlySession | None = connection.info.get(KEY)
    return read_only is not None and read_only.covers_transaction
