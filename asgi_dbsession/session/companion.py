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


# One thing that a session did. A step is a list of: its kind, its start, its stop (both times of
# Python's `perf_counter`), the line of the application that led to it, and the SQL text. The stop
# is None while the step is running. The kind `wait` means that the session waited and got no
# connection. The kind `hold` means that the session waited from start to stop, and has held a
# connection since then. The other kinds are `statement`, `prepare`, `commit` and `rollback`. A step
# is a plain list, because an object of a class would take twice as much time in each request.
Step: TypeAlias = list[Any]


# A function that opens a connection. It gets a session and the engine of this session. It can
# connect to another server than this engine does (to a replica, for example).
Connect: TypeAlias = Callable[[Any, Engine], Connection]


class Companion:
    """The data that this package attaches to a session. It has no reference back to the session.

    Attributes:
        lock: The lock that every operation of the session holds.
        reads: The object that decides if the session may read without BEGIN and COMMIT.
        read_only: The object that refuses writes, of the class `Refusals` in `optional/read_only/`.
            None if the session may write now.
        refused: The error that COMMIT must raise because a write was refused: the application may
            have caught the error. None if no write was refused.
        discarded: The error that COMMIT must raise because `close()` discarded work. None if no
            work was discarded.
        begun_before: The transaction that was open when a `with session:` block began. None if the
            session had no uncommitted work then. If an exception leaves the block, this earlier
            work is rolled back too, so the next COMMIT must raise an error.
        expects_read: True if the statement that the session is about to send is probably a read.
            Then BEGIN can be delayed. False for INSERT, UPDATE, DELETE and SQL text, and after a
            call of `connection()`.
        connections: The connections that the session has used. Some of these may be closed now.
        followers: The objects to notify after each commit and rollback of the session.
        connect: A function that opens the connections of the session, if a feature needs one
            (two-phase commit, for example). None if SQLAlchemy opens the connections, as usual.
        route: The object that chooses the primary or a replica for the session, of the class
            `Route` in the package `replicas`. None if the database has no replicas.
        recording: The object that records what the session does, of the class `Recording` in the
            package `reports`. None if nothing is measured.
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
        self.connect = partial(wrapper, self.connect or _connect)

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

        These are the error of a refused write, and the error of work that `close()` discarded. All
        work is undone now, so COMMIT need not raise these errors any more. But if `reason` is
        "exception" (a task failed), keep these errors. Other code may catch the exception of the
        task and go on. Then the next COMMIT must still raise these errors.
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


def _connect(_session: Any, engine: Engine) -> Connection:
    return engine.connect()
