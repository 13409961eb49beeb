"""The data that this package attaches to a session: the class `Companion`."""

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
    """The interface of objects that are notified after each commit and rollback of a session."""

    def record_commit(self, session: Session, /) -> None:
        """Called after the work of the session was committed."""

    def record_rollback(self, transaction: SessionTransaction, /) -> None:
        """Called after a rollback, with the transaction or savepoint that was rolled back."""


class SessionRoute(Protocol):
    """Chooses for each session if it uses the primary or a replica; see the package `replicas`."""

    def choose(self, session: Session) -> None:
        """Called before each statement: choose the primary or a replica, and set `session.bind`."""

    def connect(self, session: Session) -> Connection:
        """Return a new connection to the chosen server, or to the primary if the server is down."""
        ...

    def work_ended(self) -> bool:
        """Called after a commit or rollback.

        Return True if the caller must call `learn`, because the session has used the primary.
        """
        ...

    def learn(self) -> None:
        """Ask the primary for its WAL position (how far it has written its log); this may block."""


class Companion:
    """The data that this package attaches to a session. It has no reference back to the session.

    Attributes:
        lock: The lock that every operation of the session holds.
        reads: The object that decides if the session may read without BEGIN and COMMIT.
        writes: The object that refuses writes if the session may only read.
        expects_read: False if the running statement needs BEGIN in any case, because it is an
            INSERT, UPDATE or DELETE or is given as SQL text.
        connections: The connections that the session has used. Some of these may be closed now.
        followers: The objects to notify after each commit and rollback of the session.
        bind_asked: A function that is called with an engine each time before the session uses the
            engine.
        wait_failed: A function that is called with the pool's error if no connection became free
            within `pool_timeout`.
        two_phases: The object that names the session's two-phase transactions. None if the session
            does not use two-phase commit.
        route: The object that chooses the primary or a replica for the session. None if the
            database has no replicas.
        stats: The measurements of the session, which reports and the live page share. None if
            nothing is measured.
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
        """Add a connection to `connections`, and remove closed connections from `connections`."""
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
        """True if the session's transactions must be objects of the class `LockedTransaction`.

        Two-phase commit and replicas need this class.
        """
        return self.two_phases is not None or self.route is not None
