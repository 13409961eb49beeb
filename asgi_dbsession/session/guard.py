"""Session classes whose every operation holds the lock of the session."""

import asyncio
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import greenlet_spawn
from typing_extensions import override

from asgi_dbsession.errors import ConfigurationError, PrematureClose

from ._sqlalchemy import begin
from .completion import run_to_completion
from .lock import SessionLock
from .reads import Reads, begin_before_savepoint, begin_now, begin_on_server

R = TypeVar("R")
A = TypeVar("A", bound=AsyncSession)
S = TypeVar("S", bound=Session)
T = TypeVar("T")

# Whatever may talk to the database. Old versions of SQLAlchemy lack some.
_OPERATIONS = (
    "bulk_insert_mappings",
    "bulk_save_objects",
    "bulk_update_mappings",
    "commit",
    "delete",
    "delete_all",
    "execute",
    "flush",
    "get",
    "get_one",
    "invalidate",
    "merge",
    "merge_all",
    "prepare",
    "refresh",
    "rollback",
    "scalar",
    "scalars",
)


class Follower(Protocol):
    """What wants to know what becomes of the work of a session."""

    def record_commit(self, session: Session) -> None:
        """What the session has done is stored."""

    def record_rollback(self, transaction: SessionTransaction) -> None:
        """What was done in that transaction, or savepoint, is gone."""


class Companion:
    """What a guarded session carries with it; it does not refer to the session.

    Attributes:
        lock: The lock of the session.
        reads: Whether the session may read without a transaction.
        connections: Those used last; some are closed.
        followers: Told of each commit and rollback.
        bind_asked: Called with each engine that SQLAlchemy asked the session for.
        wait_failed: Called when no connection became free in time.
        stats: What an optional room measures of the session; shared by all that measure.
    """

    connections: tuple[Connection, ...] = ()
    bind_asked: Callable[[Any], None] | None = None
    wait_failed: Callable[[PoolTimeout], None] | None = None
    stats: Any = None

    def __init__(self, lock: SessionLock, reads: Reads) -> None:
        self.lock: SessionLock = lock
        self.reads: Reads = reads
        self.followers: list[Follower] = []

    @property
    def open_connections(self) -> tuple[Connection, ...]:
        """The connections that the session has now."""
        return tuple(each for each in self.connections if not each.closed)


def guarded_class(session_class: type[S]) -> type[S]:
    """Derive a class whose operations hold the lock; lazy loading and `run_sync` included."""
    bases = (GuardedSession,) if session_class is Session else (session_class, GuardedSession)
    return derive(session_class, bases, {})


def guarded_async_class(session_class: type[A]) -> type[A]:
    """Derive a class from `session_class` that cannot be used in a `def` function by mistake.

    There, `session.execute(…)` would return a coroutine that nobody awaits.
    """
    methods = {
        name: _on_event_loop(method)
        for name, method in inspect.getmembers(session_class, inspect.iscoroutinefunction)
        if not name.startswith("_") and name != "close"
    }
    return derive(session_class, (_ClosingAsyncSession, session_class), methods)


def derive(session_class: type[T], bases: tuple[type, ...], methods: dict[str, Any]) -> type[T]:
    """A class of the same name, because an application knows that name."""
    named = {"__module__": session_class.__module__, **methods}
    derived: type[T] = types.new_class(
        session_class.__name__, bases, exec_body=lambda body: body.update(named)
    )
    return derived


def locked(operation: Callable[..., R]) -> Callable[..., R]:
    """Have a method of a session, or of its transaction, hold the lock of the session."""

    @functools.wraps(operation)
    def operate_locked(self: Any, *args: Any, **kwargs: Any) -> R:
        lock: SessionLock = self._companion.lock
        is_outermost = lock.acquire()
        try:
            return operation(self, *args, **kwargs)
        except PoolTimeout as error:
            if self._companion.wait_failed is not None:
                self._companion.wait_failed(error)
            raise
        finally:
            if is_outermost:
                lock.release()

    return operate_locked


def _on_event_loop(method: Callable[..., R]) -> Callable[..., R]:
    @functools.wraps(method)
    def call_on_event_loop(self: Any, *args: Any, **kwargs: Any) -> R:
        if asyncio._get_running_loop() is None:
            raise ConfigurationError(
                f"`session.{method.__name__}()` of an AsyncSession was called in a `def` function, "
                "where nothing awaits it, and so would do nothing. Write the function with "
                "`async def` and `await` the call, or use a SyncDatabase in it."
            )
        return method(self, *args, **kwargs)

    return call_on_event_loop


class _ClosingAsyncSession(AsyncSession):
    """Lets the error of the application pass where it closes the session because of it."""

    @override
    async def close(self) -> None:
        if sys.exception() is None:
            await super().close()
        else:
            await self._discard()

    @override
    async def __aexit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if type_ is None:
            await super().__aexit__(type_, value, traceback)
        else:
            await self._discard()

    async def _discard(self) -> None:
        session: Any = self.sync_session
        await run_to_completion(greenlet_spawn(session.discard))


class GuardedSession(Session):
    """What `guarded_class` derives from. Its companion is set once it is made."""

    _companion: Companion
    transaction_class: type[SessionTransaction] = SessionTransaction  # see `managed.py`

    @override
    def add(self, instance: object, *args: Any, **kwargs: Any) -> None:
        self._companion.lock.record_user()
        super().add(instance, *args, **kwargs)

    @override
    @locked
    def begin(self, nested: bool = False) -> SessionTransaction:
        # RELEASE SAVEPOINT must not run during a commit or rollback of the session either.
        if nested:
            for connection in self._companion.open_connections:
                begin_before_savepoint(connection)
        return begin(self, self.transaction_class, nested=nested)

    @override
    @locked
    def connection(self, *args: Any, **kwargs: Any) -> Connection:
        connection = super().connection(*args, **kwargs)
        begin_now(connection)
        begin_on_server(connection)
        return connection

    @override
    def close(self) -> None:
        lock = self._companion.lock
        if lock.is_closed:
            return
        if lock.is_held_by_end_of_caller():
            super().close()
        elif sys.exception() is None:
            self.reset()
        else:
            self.discard()

    @override
    @locked
    def reset(self) -> None:
        if self.in_transaction():
            # As at the end of `async with get_session()`: the work would be lost, and a success
            # sent all the same.
            raise PrematureClose(self._companion.lock.database)
        super().reset()

    @locked
    def discard(self) -> None:
        """Roll back what an error interrupted, and forget the objects."""
        super().reset()


for _name in _OPERATIONS:
    if hasattr(Session, _name):
        setattr(GuardedSession, _name, locked(getattr(Session, _name)))
