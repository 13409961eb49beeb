"""The unit of work: the sessions of one request or of one `begin()` block."""

from collections import deque
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from asgi_dbsession.errors import SessionClosed
from asgi_dbsession.session.completion import call_here
from asgi_dbsession.session.managed import ManagedSession, Sessions
from asgi_dbsession.session.reads import may_have_written
from asgi_dbsession.types import Scope

from .observer import UnitObserver

S = TypeVar("S")


class SessionSource(Protocol[S]):
    """The attributes and methods that a unit of work needs of a database object.

    `AsyncDatabase` and `SyncDatabase` implement this protocol.
    """

    is_async: bool
    observers: tuple[UnitObserver, ...]

    def open_session(self, scope: Scope | None, *, read_only: bool) -> ManagedSession[S]:
        """Return a new session. Its first statement will check out a connection of the pool."""
        ...


class UnitOfWork:
    """The sessions of one request or `begin()` block, which are committed or rolled back together.

    Each request gets its unit of work at its start. If `get_session()` made the unit of work in an
    inner task, the middleware would not find the unit of work.

    Attributes:
        databases: The first one of each kind (async or sync) is the default.
        scope: The ASGI scope. None outside of a request, and after its end.
        observers: Objects that are notified of the begin, of new sessions, and of each commit and
            rollback. When a session is opened, the observers of its database are added.
        sessions: The opened sessions, by database. Empty after the end.
        is_inner: True for a `begin()` block or `on_commit` function inside another unit of work.
        joins_outer_unit: True if this unit of work uses sessions of an outer one of the same
            request.
        joined: In a `begin(join=True)` block, the unit of work whose session the block uses.
        rollback: The last `set_rollback` call since the last commit or rollback, or None.
        rollbacks: The last `set_rollback` call of each task. The newest call is last.
        is_used: True after a call of `get_session`, `on_commit` or `set_rollback`.
        failure: The first error of a commit or rollback. No message may be sent afterwards.
        callbacks: The functions given to `on_commit`, as `AfterCommit` objects.
        two_phases: The object that commits the sessions in two phases, or None.
        read_only: True if the sessions may only read. Set before the first session is opened.
        is_routed: True if a database of a session has replicas.
        is_blocking: True if the calling thread commits, without an event loop.
        lost_work: True if an exception in this `begin()` block has undone writes.
        is_answered: True after the start of the response. Always True for a WebSocket.
    """

    # Defaults are class attributes, because setting them for each request would cost time.
    is_used: bool = False
    rollback: bool | None = None
    rollbacks: Mapping[object, bool] = MappingProxyType({})
    failure: Exception | None = None
    closed: bool = False
    two_phases: Any = None
    read_only: bool = False
    is_routed: bool = False
    is_blocking: bool = False
    joins_outer_unit: bool = False
    is_inner: bool = False
    is_answered: bool = False
    lost_work: bool = False
    joined: "UnitOfWork | None" = None

    def __init__(
        self,
        databases: tuple[SessionSource[Any], ...],
        scope: Scope | None,
        enclosing: "UnitOfWork | None",
        observers: tuple[UnitObserver, ...] = (),
    ) -> None:
        self.databases: tuple[SessionSource[Any], ...] = databases
        self.scope: Scope | None = scope
        self.enclosing: UnitOfWork | None = enclosing
        self.observers: tuple[UnitObserver, ...] = observers
        self.sessions: dict[SessionSource[Any], ManagedSession[Any]] = {}
        self.callbacks: list[Any] = []
        for observer in observers:
            observer.unit_began(self)

    def chain(self) -> Iterator["UnitOfWork"]:
        """Yield this unit of work, the one around it, and so on, up to the outermost one."""
        unit: UnitOfWork | None = self
        while unit is not None:
            yield unit
            unit = unit.enclosing

    def of_same_request(self) -> Iterator["UnitOfWork"]:
        """Yield this unit of work, and the outer ones that are a part of the same request."""
        unit: UnitOfWork | None = self
        while unit is not None:
            yield unit
            unit = unit.joined or (unit.enclosing if unit.joins_outer_unit else None)

    @property
    def outermost(self) -> "UnitOfWork":
        """The outermost unit of work that this one joins, or this one itself if it joins none.

        A unit of work joins an outer one if it uses the sessions of the outer one.
        """
        return deque(self.of_same_request(), maxlen=1)[0] if self.joins_outer_unit else self

    @property
    def may_have_written(self) -> bool:
        """False if it is certain that no session has writes or changed objects. Otherwise True."""
        return any(may_have_written(each.orm) for each in self.opened)

    @property
    def opened(self) -> tuple[ManagedSession[Any], ...]:
        """The open sessions, as a copy, because another thread may open a session meanwhile."""
        return tuple(self.sessions.values())

    def with_work(self) -> Sessions:
        """Return the sessions that have something to commit or roll back."""
        working = []
        for each in self.opened:
            if each.has_work:
                working.append(each)
            # The application itself has committed or rolled back this session. So forget which
            # tasks used the session until now.
            else:
                each.lock.forget_users()
        return working

    def forget_decisions(self) -> None:
        """Forget all calls of `set_rollback`, so that they do not apply to later work."""
        self.rollback, self.rollbacks = None, {}

    def manages(self, database: SessionSource[Any]) -> bool:
        """Return True if this unit of work opens and closes the session of the database.

        False if it does not have the database, or if it uses the session that an outer unit of work
        of the same request opens (see `joins_outer_unit`).
        """
        if database not in self.databases:
            return False
        return not self.joins_outer_unit or not any(
            database in unit.databases for unit in self.of_same_request() if unit is not self
        )

    def within(self, databases: tuple[SessionSource[Any], ...]) -> "UnitOfWork":
        """Make a new unit of work inside this one, with the ASGI scope of the same request.

        Outside of a request, and after its end, the new unit of work has no scope (None).
        """
        serving = next((each for each in self.chain() if not each.is_inner), None)
        scope = serving.scope if serving is not None else None
        unit = UnitOfWork(databases, scope, self, self.observers)
        unit.is_inner = True
        return unit

    def open(self, database: SessionSource[S]) -> S:
        """Return the session of a database, and open it on first use.

        Raises:
            SessionClosed: The unit of work has ended.
            DatabaseNotRunning: The `AsyncDatabase` or `SyncDatabase` object was not started.
        """
        if self.closed:
            raise SessionClosed(database)
        opened: ManagedSession[S] | None = self.sessions.get(database)
        return (opened or self._open(database)).session

    def _open(self, database: SessionSource[S]) -> ManagedSession[S]:
        self.is_used = True
        made = database.open_session(self.scope, read_only=self.read_only)
        if self.two_phases is not None and not self.read_only:
            made = self.two_phases.manage(made)
        opened = self.sessions.setdefault(database, made)
        # Another thread has opened a session of this database at the same time. Use that session.
        if opened is not made:
            return opened
        if self.is_blocking:
            made.run = call_here
        self.is_routed = self.is_routed or made.companion.route is not None
        # Another thread has closed this unit of work meanwhile. So close the new session too.
        if self.closed:
            made.close_if_idle()
            raise SessionClosed(database)
        for callback in tuple(self.outermost.callbacks):
            callback.attach(made)
        if database.observers:
            # Add the observers of the database. The unit of work may already have one of them, from
            # another database. Keep each observer only once, so that it is notified only once.
            self.observers = tuple(dict.fromkeys((*self.observers, *database.observers)))
        for observer in self.observers:
            observer.session_opened(self, database, made)
        return opened
