"""The unit of work: the sessions of one request, or of one `begin()`, and access to them."""

from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from asgi_dbsession.errors import ConfigurationError, NoSession, SessionClosed
from asgi_dbsession.session.completion import call_here
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.two_phases import two_phases_of
from asgi_dbsession.types import Scope

from .after_commit import AfterCommit
from .observer import UnitObserver

S = TypeVar("S")


class SessionSource(Protocol[S]):
    """The methods of a database that a unit of work uses."""

    is_async: bool
    observers: tuple[UnitObserver, ...]

    def open_session(self, scope: Scope | None, *, read_only: bool) -> ManagedSession[S]:
        """Return a new session, which checks out a connection at its first statement."""
        ...


class UnitOfWork:
    """The sessions of one request, or of one `begin()`; committed or rolled back together.

    The context variable `current_unit` gets an empty unit at the start of the request. If an inner
    task or worker thread set the variable later, the outer code would not see the value.

    Args:
        databases: The databases whose sessions the unit opens; the first one of each kind is the
            default.
        scope: The ASGI scope for `session.info["scope"]`. None after the end of the request.
        enclosing: The unit around this unit, for the databases that this unit does not have.
        observers: The objects to call at each event of the unit. When the unit opens a session, the
            observers of the session's database are added.

    Attributes:
        is_inner: True if the method `within` made the unit, inside of another unit of work.
        joins_outer_unit: True if `enclosing` belongs to the same request. If both units have a
            database, `enclosing` opens and closes the session of this database.
        joined: The unit whose session a block of `begin(join=True)` uses; None without a block.
        rollback: The last argument of `set_rollback` since the last commit; None without a call.
        rollback_set_by: The task that called `set_rollback`.
        is_used: True after a call of `get_session`, `on_commit` or `set_rollback`.
        failure: The first error of a commit or rollback. After this error, nothing may be sent.
        callbacks: The functions given to `on_commit`, to be called after COMMIT.
        two_phase: True if the sessions use two-phase commit.
        read_only: True if the sessions may only read; set before the first session is opened.
        is_routed: True if a session of the unit chooses between the primary and its replicas.
        is_blocking: True if the unit ends on the calling thread, without an event loop.
        is_answered: True after the start of the response, and always True on a WebSocket.
        closed: True if the unit has ended.
    """

    # These defaults are class attributes, so that a request does not spend time on setting them.
    is_used: bool = False
    rollback: bool | None = None
    rollback_set_by: object = None
    failure: Exception | None = None
    closed: bool = False
    two_phase: bool = False
    read_only: bool = False
    is_routed: bool = False
    is_blocking: bool = False
    joins_outer_unit: bool = False
    is_inner: bool = False
    is_answered: bool = False
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
        self.callbacks: list[AfterCommit] = []
        for observer in observers:
            observer.unit_began(self)

    def chain(self) -> Iterator["UnitOfWork"]:
        """Iterate over this unit and all units around it, from the innermost to the outermost."""
        unit: UnitOfWork | None = self
        while unit is not None:
            yield unit
            unit = unit.enclosing

    def of_same_request(self) -> Iterator["UnitOfWork"]:
        """Iterate over this unit and all outer units that belong to the same request."""
        unit: UnitOfWork | None = self
        while unit is not None:
            yield unit
            unit = unit.joined or (unit.enclosing if unit.joins_outer_unit else None)

    @property
    def outermost(self) -> "UnitOfWork":
        """The unit that ends last of all units of the same request."""
        return deque(self.of_same_request(), maxlen=1)[0] if self.joins_outer_unit else self

    def manages(self, database: SessionSource[Any]) -> bool:
        """Return True if this unit opens and closes the session of the database."""
        if database not in self.databases:
            return False
        return not self.joins_outer_unit or not any(
            database in unit.databases for unit in self.of_same_request() if unit is not self
        )

    def within(self, databases: tuple[SessionSource[Any], ...]) -> "UnitOfWork":
        """Make a unit inside this unit; the new unit has no scope if the request has ended."""
        serving = next((each for each in self.chain() if not each.is_inner), None)
        scope = serving.scope if serving is not None else None
        unit = UnitOfWork(databases, scope, self, self.observers)
        unit.is_inner = True
        return unit

    def open(self, database: SessionSource[S]) -> S:
        """Return the session of a database that this unit manages; make the session on first use.

        Raises:
            SessionClosed: The unit of work has ended.
            DatabaseNotRunning: The database has not been started.
        """
        if self.closed:
            raise SessionClosed(database)
        opened: ManagedSession[S] | None = self.sessions.get(database)
        return (opened or self._open(database)).session

    def _open(self, database: SessionSource[S]) -> ManagedSession[S]:
        self.is_used = True
        made = database.open_session(self.scope, read_only=self.read_only)
        opened = self.sessions.setdefault(database, made)
        # If another thread has opened the session at the same time, use the session of that thread.
        if opened is not made:
            return opened
        if self.two_phase and not self.read_only:
            made.orm.twophase, made.companion.two_phases = True, two_phases_of(self)
        if self.is_blocking:
            made.run = call_here
        self.is_routed = self.is_routed or made.companion.route is not None
        # Another thread has closed the unit during this call. So close the new session too.
        if self.closed:
            made.close_if_idle()
            raise SessionClosed(database)
        if self.callbacks or self.joins_outer_unit:
            for callback in tuple(self.outermost.callbacks):
                callback.attach(made)
        for observer in database.observers:
            self._add_observer(observer)
        if self.observers:
            made.companion.wait_failed = self._tell_of_failed_wait
            for observer in self.observers:
                observer.session_opened(self, database, made)
        return opened

    def _add_observer(self, observer: UnitObserver) -> None:
        # An outer unit may have passed the same observer to this unit already.
        if observer not in self.observers:
            self.observers = (*self.observers, observer)
            observer.unit_began(self)

    def _tell_of_failed_wait(self, error: Exception) -> None:
        for observer in self.observers:
            observer.wait_failed(self, error)


current_unit: ContextVar[UnitOfWork | None] = ContextVar("asgi_dbsession", default=None)


def unit_that_manages(database: SessionSource[Any]) -> UnitOfWork:
    """Return the nearest unit of work that manages the session of the database.

    Raises:
        NoSession: The caller is in no unit of work that manages the database.
        SessionClosed: The `begin(join=True)` block that started this task has ended.
    """
    innermost = current_unit.get()
    for unit in innermost.chain() if innermost is not None else ():
        if unit.joined is not None and unit.closed and database in unit.databases:
            raise SessionClosed(database, of_block=True)
        if unit.manages(database):
            return unit
    raise NoSession(database)


def get_session() -> AsyncSession:
    """Return the session of the default database: the first `AsyncDatabase` of the unit of work.

    The session is opened on first use, and its first statement checks out a connection. The session
    is valid until the request (or the `begin()`) ends, and is then closed permanently. Only one
    task at a time may use the session; each parallel task must open its own `database.begin()`.

    Raises:
        NoSession: This code runs outside of a request that `DBSessionMiddleware` serves, and
            outside of `begin()`.
        SessionClosed: The request that this task belongs to has ended.
        DatabaseNotRunning: The database has not been started.
        ConfigurationError: The unit of work has only sync databases.
    """
    session: AsyncSession = _default_session(is_async=True)
    return session


def get_sync_session() -> Session:
    """Return the session of the first `SyncDatabase` of the unit of work, for `def` handlers.

    See `get_session` for how long the session is valid, and which errors are raised.
    """
    session: Session = _default_session(is_async=False)
    return session


async def session_dependency() -> AsyncSession:
    """Return what `get_session()` returns, for `Depends(session_dependency)` and other injectors.

    `AsyncDatabase.session_dependency` explains why this is a coroutine function without parameters.
    """
    return get_session()


def _default_session(*, is_async: bool) -> Any:
    innermost = current_unit.get()
    if innermost is None:
        raise NoSession("the default database")
    for unit in innermost.chain():
        for database in unit.databases:
            if database.is_async is is_async:
                manages = not unit.joins_outer_unit or unit.manages(database)
                return (unit if manages else unit_that_manages(database)).open(database)
    kind = "AsyncDatabase" if is_async else "SyncDatabase"
    other = "`get_sync_session()` in a `def`" if is_async else "`get_session()` in an `async def`"
    raise ConfigurationError(
        f"There is no {kind} here, only {innermost.databases[0]}. Use {other} function, or give "
        f"DBSessionMiddleware an object of the class {kind} too."
    )
