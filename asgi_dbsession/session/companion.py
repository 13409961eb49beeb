"""The data that this package attaches to a session, such as its lock and its connections."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction

from asgi_dbsession.errors import ForbiddenWrite, PrematureClose

from .end import Reason, current_end
from .lock import SessionLock
from .reads import Reads


class Follower(Protocol):
    """The interface of objects that are notified after each commit and rollback of a session."""

    def record_commit(self, session: Session, /) -> None:
        """Called after a COMMIT of the session."""

    def record_rollback(self, transaction: SessionTransaction, /) -> None:
        """Called after a rollback of the session, or of one of its savepoints.

        Args:
            transaction: The transaction or savepoint that was rolled back.
        """


# A step of a session, such as a COMMIT, as a list (faster than an object): kind, start, stop (None
# while the step runs), line of the application, SQL text.
Step: TypeAlias = list[Any]


# A function that opens a connection. It gets a session and the engine of this session. It can
# connect to another server than this engine does (to a replica, for example).
Connect: TypeAlias = Callable[[Any, Engine], Connection]


class Companion:
    """The data that this package attaches to a session. It has no reference back to the session.

    Attributes:
        read_only: The object (a `Refusals`) that refuses writes. None if the session may write.
        refused: The error of a refused write, which COMMIT must raise again, or None.
        discarded: The error that COMMIT must raise because `close()` discarded work, or None.
        begun_before: The uncommitted transaction that was open when a `with session:` block began.
        expects_read: True if the next statement is probably a read, so BEGIN can be delayed.
        connections: The connections that the session has used. Some may be closed now.
        connect: A function that opens connections (to replicas, for example). If None,
            SQLAlchemy opens the connections.
        route: The object (a `Route`) that chooses the primary or a replica. None without replicas.
        recording: The object (a `Recording`) that records statements for reports, or None.
    """

    read_only: Any = None
    refused: ForbiddenWrite | None = None
    discarded: PrematureClose | None = None
    begun_before: SessionTransaction | None = None
    expects_read: bool = True
    connections: tuple[Connection, ...] = ()
    route: Any = None
    recording: Any = None

    def __init__(self, lock: SessionLock, reads: Reads) -> None:
        self.lock: SessionLock = lock
        self.reads: Reads = reads
        self.connect: Connect | None = reads.connect
        self.followers: list[Follower] = []

    def wrap_connect(self, wrapper: Callable[[Connect, Any, Engine], Connection]) -> None:
        """Open the next connections of the session with `wrapper`.

        Args:
            wrapper: A function with three arguments: the function that has opened the connections
                until now, the session and the engine. It returns the connection.
        """
        self.connect = partial(wrapper, self.connect or (lambda _, engine: engine.connect()))

    @property
    def must_fail(self) -> bool:
        """True if COMMIT must raise an error, because a write was refused or work was discarded."""
        return self.refused is not None or self.discarded is not None

    def check_commit(self) -> None:
        """Raise an error before COMMIT if a write was refused, or if work was discarded.

        Raises:
            ForbiddenWrite: A write was refused, and the application caught the error.
            PrematureClose: The application called `close()` while it handled an exception. This
                error is not raised if the application calls `commit()` itself.
        """
        if self.refused is not None:
            raise self.refused
        if self.discarded is not None and current_end.get() is not None:
            raise self.discarded

    def rolled_back(self, reason: Reason) -> None:
        """Called after a rollback: forget the errors that the next COMMIT would raise.

        If `reason` is "exception" (a task failed), keep the errors, because other code may catch
        the exception of the task and call `commit()`.
        """
        if reason != "exception":
            self.refused = self.discarded = None

    def add_connection(self, connection: Connection) -> None:
        """Add a connection to `connections`, and remove closed connections from `connections`."""
        used = self.connections
        if used:
            used = tuple(each for each in used if not each.closed and each is not connection)
        self.connections = (*used, connection)

    @property
    def open_connections(self) -> tuple[Connection, ...]:
        """The open connections of the session."""
        return tuple(each for each in self.connections if not each.closed)
