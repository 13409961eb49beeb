"""The data that this package adds to a session."""

from collections.abc import Callable
from typing import Any, Protocol

from sqlalchemy import Connection
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, SessionTransaction

from .lock import SessionLock
from .reads import Reads
from .two_phases import TwoPhases
from .writes import Writes


class Follower(Protocol):
    """The interface of objects that a session calls after each commit and rollback."""

    def record_commit(self, session: Session, /) -> None:
        """Record that the work of the session was committed."""

    def record_rollback(self, transaction: SessionTransaction, /) -> None:
        """Record that the work of this transaction or savepoint was rolled back."""


class SessionRoute(Protocol):
    """Chooses the server of a session, the primary or a replica; see the package `replicas`."""

    def choose(self, session: Session) -> None:
        """Called before each statement: set the engine of the session to the chosen server."""

    def connect(self, session: Session) -> Connection:
        """Return a new connection to the chosen server, or to the primary if the server is down."""
        ...

    def work_ended(self) -> bool:
        """Record a commit or rollback; return True if the caller must call `learn`."""
        ...

    def learn(self) -> None:
        """Ask the primary for its WAL position after the commit or rollback; this may block."""


class Companion:
    """The data that this package adds to a session; it has no reference to the session.

    Attributes:
        lock: The lock of the session.
        reads: The object that decides if the session may read without a transaction.
        writes: The object that refuses writes if the session may only read.
        expects_read: False if the running statement needs BEGIN in any case (INSERT, SQL text).
        connections: The connections that the session used last; some of these may be closed.
        followers: The objects to call after each commit and rollback.
        bind_asked: A function to call with each engine before the session uses it.
        wait_failed: A function to call if no connection became free within `pool_timeout`. It takes
            the error of the pool.
        two_phases: The object that names the session's transactions; None without two-phase commit.
        route: The object that chooses the primary or a replica; None without replicas.
        stats: The measurements of the session, shared by all observers; None without observers.
    """

    expects_read: bool = True
    connections: tuple[Connection, ...] = ()
    bind_asked: Callable[[Any], None] | None = None
    wait_failed: Callable[[PoolTimeout], None] | None = None
    two_phases: TwoPhases | None = None
    route: SessionRoute | None = None
    stats: Any = None

    def __init__(self, lock: SessionLock, reads: Reads, writes: Writes) -> None:
        self.lock: SessionLock = lock
        self.reads: Reads = reads
        self.writes: Writes = writes
        self.followers: list[Follower] = []

    def add_connection(self, connection: Connection) -> None:
        """Record that the session uses a connection, which it may have used before."""
        used = self.connections
        if used:
            used = tuple(each for each in used if not each.closed and each is not connection)
        self.connections = (*used, connection)

    @property
    def open_connections(self) -> tuple[Connection, ...]:
        """The open connections of the session."""
        return tuple(each for each in self.connections if not each.closed)

    @property
    def needs_own_transaction(self) -> bool:
        """True if all transactions of the session must be objects of `LockedTransaction`."""
        return self.two_phases is not None or self.route is not None
