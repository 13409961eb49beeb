"""The sessions of one request, or of one `begin()`, and how to get at them."""

from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from asgi_dbsession.errors import ConfigurationError, NoSession, SessionClosed
from asgi_dbsession.session.completion import call_here
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.types import Scope

from .after_commit import AfterCommit
from .observer import UnitObserver

S = TypeVar("S")


class SessionSource(Protocol[S]):
    """What a unit of work needs of a database."""

    is_async: bool
    observers: tuple[UnitObserver, ...]

    def open_session(self, scope: Scope | None) -> ManagedSession[S]:
        """Make a session; its first statement checks a connection out."""
        ...


class UnitOfWork:
    """The sessions of one request, or of one `begin()`; committed or rolled back together.

    It is put into the context empty, and filled from below. A value that is set further down (by
    the task of an inner middleware, by a worker thread) would not be visible up here.

    Args:
        databases: Those whose sessions it opens; the first of each kind is the default.
        scope: The ASGI scope that it serves, for `session.info["scope"]`. None once it has ended.
        enclosing: The unit around it, where other databases are looked for.
        observers: Told of what happens to it; and so are those of each database, from when its
            session is opened.

    Attributes:
        is_inner: Whether it was made by `within`, and so serves the request of a unit around it.
        joins_outer_unit: Whether `enclosing` is of the same request, and keeps its databases.
        joined: The unit whose session `begin(join=True)` uses; None for any other unit.
        rollback: What `set_rollback` said about the work since the last end.
        rollback_set_by: The task that said so.
        is_used: Whether anything was asked of it: a session, `on_commit`, `set_rollback`.
        failure: The first error of an end. From then on, nothing may be sent.
        callbacks: What `on_commit` was given, and waits for a commit.
        two_phase: Whether its sessions commit in two phases.
        is_blocking: Whether it ends on the calling thread, without an event loop.
        closed: Whether it has ended.
    """

    # Set on the class, because every request pays for each attribute of its own.
    rollback_set_by: object = None
    two_phase: bool = False
    is_blocking: bool = False
    joins_outer_unit: bool = False
    is_inner: bool = False
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
        self.is_used: bool = False
        self.rollback: bool | None = None
        self.failure: Exception | None = None
        self.callbacks: list[AfterCommit] = []
        self.closed: bool = False
        for observer in observers:
            observer.unit_began(self)

    def chain(self) -> Iterator["UnitOfWork"]:
        """This unit and those around it, the nearest first."""
        unit: UnitOfWork | None = self
        while unit is not None:
            yield unit
            unit = unit.enclosing

    def of_same_request(self) -> Iterator["UnitOfWork"]:
        """This unit and those around it that end with the same request, the nearest first."""
        unit: UnitOfWork | None = self
        while unit is not None:
            yield unit
            unit = unit.joined or (unit.enclosing if unit.joins_outer_unit else None)

    @property
    def outermost(self) -> "UnitOfWork":
        """The unit that ends last, of those of the same request."""
        return deque(self.of_same_request(), maxlen=1)[0] if self.joins_outer_unit else self

    def manages(self, database: SessionSource[Any]) -> bool:
        """Whether this unit opens and ends the session of that database."""
        if database not in self.databases:
            return False
        return not self.joins_outer_unit or not any(
            database in unit.databases for unit in self.of_same_request() if unit is not self
        )

    def within(self, databases: tuple[SessionSource[Any], ...]) -> "UnitOfWork":
        """A unit of its own, inside of this one. It has no scope once the request has ended."""
        serving = next((each for each in self.chain() if not each.is_inner), None)
        scope = serving.scope if serving is not None else None
        unit = UnitOfWork(databases, scope, self, self.observers)
        unit.is_inner = True
        return unit

    def open(self, database: SessionSource[S]) -> S:
        """The session of a database that this unit manages, made on first use.

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
        made = database.open_session(self.scope)
        opened = self.sessions.setdefault(database, made)
        if opened is not made:  # another thread was faster
            return opened
        if self.two_phase:
            made.orm.twophase = True
        if self.is_blocking:
            made.run = call_here
        if self.closed:  # another thread ended it meanwhile
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
        if observer not in self.observers:  # else a unit around this one had it
            self.observers = (*self.observers, observer)
            observer.unit_began(self)

    def _tell_of_failed_wait(self, error: Exception) -> None:
        for observer in self.observers:
            observer.wait_failed(self, error)


current_unit: ContextVar[UnitOfWork | None] = ContextVar("asgi_dbsession", default=None)


def unit_that_manages(database: SessionSource[Any]) -> UnitOfWork:
    """The nearest unit of work that has a session of the database.

    Raises:
        NoSession: There is none here.
        SessionClosed: A task has outlived the `begin(join=True)` that it was started in.
    """
    innermost = current_unit.get()
    for unit in innermost.chain() if innermost is not None else ():
        if unit.joined is not None and unit.closed and database in unit.databases:
            raise SessionClosed(database, of_block=True)
        if unit.manages(database):
            return unit
    raise NoSession(database)


def get_session() -> AsyncSession:
    """The session of the default database: the first `AsyncDatabase` of the current unit of work.

    It is opened on first use, and its first statement checks a connection out. It is valid until
    the request (or the `begin()`) ends, and is then closed permanently. One task at a time may use
    it: tasks that run at once open `database.begin()` each.

    Raises:
        NoSession: Not inside a request that `DBSessionMiddleware` serves, nor inside `begin()`.
        SessionClosed: The request that this task belongs to has ended.
        DatabaseNotRunning: The database has not been started.
        ConfigurationError: There are only sync databases here.
    """
    session: AsyncSession = _default_session(is_async=True)
    return session


def get_sync_session() -> Session:
    """The same for the first `SyncDatabase`: for handlers written with `def`."""
    session: Session = _default_session(is_async=False)
    return session


async def session_dependency() -> AsyncSession:
    """`get_session` for injectors: `Annotated[AsyncSession, Depends(session_dependency)]`.

    See `AsyncDatabase.session_dependency` for why it is a coroutine function without parameters.
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
