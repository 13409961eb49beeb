"""The data that this package attaches to a session: the class `Companion`."""

from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol, TypeAlias

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, SessionTransaction

from .lock import SessionLock
from .reads import Reads
from .writes import Writes


class Follower(Protocol):
    """The interface of objects that are notified after each commit and rollback of a session."""

    def record_commit(self, session: Session, /) -> None:
        """Called after the work of the session was committed."""

    def record_rollback(self, transaction: SessionTransaction, /) -> None:
        """Called after a rollback, with the transaction or savepoint that was rolled back."""


class SessionRoute(Protocol):
    """Chooses for each session if it uses the primary or a replica; see the package `replicas`."""

    def work_ended(self) -> bool:
        """Called after a commit or rollback.

        Return True if the caller must call `learn`, because the session has used the primary.
        """
        ...

    def learn(self) -> None:
        """Ask the primary for its WAL position (how far it has written its log); this may block."""


# One thing that a session did. A step is a list of: its kind, its start, its stop (both times of
# Python's `perf_counter`), the line of the application that led to it, and the SQL text. The stop
# is None while the step is running. These are the kinds. `wait`: the session waited and got no
# connection. `hold`: the session waited from start to stop, and has held a connection since then.
# The other kinds are `statement`, `prepare`, `commit` and `rollback`. A step is a plain list,
# because an object of a class would take twice as much time in each request.
Step: TypeAlias = list[Any]


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
        connect: A function that connects to the given engine of the session, or to another server.
            None without two-phase commit and without replicas, which need such a function.
        route: The object that chooses the primary or a replica for the session. None if the
            database has no replicas.
        unit: The unit of work of the session, if it has observers. Otherwise None.
        steps: What the session did since the last commit or rollback, as a list of `Step`. None if
            nothing is measured.
        asked: When the session last asked for an engine. If it had no connection, it began to wait
            for one then.
    """

    expects_read: bool = True
    connections: tuple[Connection, ...] = ()
    connect: Callable[[Any, Engine], Connection] | None = None
    route: SessionRoute | None = None
    unit: Any = None
    steps: Any = None
    asked: float = 0

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
    def waits_since(self) -> float | None:
        """When the session began to wait for a connection. None if it is not waiting now."""
        is_newer = not self.steps or self.asked > (self.steps[-1][2] or self.asked)
        is_waiting = self.asked and is_newer and self.lock.is_busy and not self.open_connections
        return self.asked if is_waiting else None

    def operation_failed(self, error: BaseException) -> None:
        """Record how long a failed operation waited for a connection, and notify of a time-out."""
        since, now = self.waits_since, perf_counter()
        if self.steps is not None and since is not None:
            if self.steps and self.steps[-1][0] == "wait":
                # Waits that follow each other are one step, so that the list does not grow without
                # limit.
                self.steps[-1][2] += now - since
            else:
                self.steps.append(["wait", since, now, None, ""])
            self.unit.has_news = True
        if isinstance(error, PoolTimeout):
            for observer in self.unit.observers:
                observer.wait_failed(self.unit, self.lock.database)

    @property
    def open_connections(self) -> tuple[Connection, ...]:
        """The open connections of the session."""
        return tuple(each for each in self.connections if not each.closed)
