"""Session classes whose every operation holds the lock of the session."""

import asyncio
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import greenlet_spawn
from typing_extensions import override

from asgi_dbsession.errors import ConfigurationError, PrematureClose

from ._sqlalchemy import begin
from .completion import run_to_completion
from .lock import SessionLock

R = TypeVar("R")
A = TypeVar("A", bound=AsyncSession)
S = TypeVar("S", bound=Session)
T = TypeVar("T")

# Whatever may talk to the database. Some names are younger than the oldest supported SQLAlchemy.
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
    """What a guarded session carries with it. It does not refer to the session.

    Args:
        lock: The lock of the session.
        watch_engine: Called with each other engine that the session uses (`binds`).

    Attributes:
        connections: Those that the session has used last; some may be closed by now.
        followers: Told of each commit and rollback of the session.
        bind_asked: Called with each engine that SQLAlchemy asked the session for.
        wait_failed: Called when no connection became free in time.
    """

    def __init__(self, lock: SessionLock, watch_engine: Callable[[Engine], None]) -> None:
        self.lock: SessionLock = lock
        self.watch_engine: Callable[[Engine], None] = watch_engine
        self.connections: tuple[Connection, ...] = ()
        self.followers: list[Follower] = []
        self.bind_asked: Callable[[Any], None] | None = None
        self.wait_failed: Callable[[PoolTimeout], None] | None = None

    @property
    def open_connections(self) -> tuple[Connection, ...]:
        """The connections that the session has now."""
        return tuple(each for each in self.connections if not each.closed)


def guarded_class(session_class: type[S]) -> type[S]:
    """Derive a class from `session_class` whose operations hold the lock.

    The guard is on the plain `Session`, below an `AsyncSession`. So it covers lazy loading,
    `run_sync` and the methods that a class of the application adds.
    """
    bases = (GuardedSession,) if session_class is Session else (session_class, GuardedSession)
    return _derive(session_class, bases, {"get_bind": _telling(session_class.get_bind)})


def guarded_async_class(session_class: type[A]) -> type[A]:
    """Derive a class from `session_class` that cannot be used in a `def` function by mistake.

    There, `session.execute(…)` would return a coroutine that nobody awaits: no error, no row.
    """
    methods = {
        name: _on_event_loop(method)
        for name, method in inspect.getmembers(session_class, inspect.iscoroutinefunction)
        if not name.startswith("_")
    }
    bases = (_ClosingAsyncSession, session_class)
    methods.pop("close")
    return _derive(session_class, bases, methods)


def _derive(session_class: type[T], bases: tuple[type, ...], methods: dict[str, Any]) -> type[T]:
    # An application sees a class of the name that it knows.
    named = {"__module__": session_class.__module__, **methods}
    derived: type[T] = types.new_class(
        session_class.__name__, bases, exec_body=lambda body: body.update(named)
    )
    return derived


def _locked(operation: Callable[..., R]) -> Callable[..., R]:
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


def _telling(get_bind: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_bind)
    def get_bind_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        bind = get_bind(self, *args, **kwargs)
        if self._companion.bind_asked is not None:
            self._companion.bind_asked(bind)
        return bind

    return get_bind_and_tell


def _on_event_loop(method: Callable[..., R]) -> Callable[..., R]:
    @functools.wraps(method)
    def call_on_event_loop(self: Any, *args: Any, **kwargs: Any) -> R:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError(
                f"`session.{method.__name__}()` of an AsyncSession was called in a `def` function, "
                "where nothing awaits it, and so would do nothing. Write the function with "
                "`async def` and `await` the call, or use a SyncDatabase in it."
            ) from None
        return method(self, *args, **kwargs)

    return call_on_event_loop


class _ClosingAsyncSession(AsyncSession):
    """Lets the error of the application pass where it closes the session because of it."""

    sync_session: "GuardedSession"

    @override
    async def close(self) -> None:
        if sys.exception() is None:
            await super().close()
        else:
            await run_to_completion(greenlet_spawn(self.sync_session.discard))

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
            await run_to_completion(greenlet_spawn(self.sync_session.discard))


class GuardedSession(Session):
    """What `guarded_class` derives from. Its companion is set once it is made."""

    _companion: Companion

    @override
    def add(self, instance: object, *args: Any, **kwargs: Any) -> None:
        self._companion.lock.record_user()
        super().add(instance, *args, **kwargs)

    @override
    @_locked
    def begin(self, nested: bool = False) -> SessionTransaction:
        # RELEASE SAVEPOINT must not overlap an end either.
        if nested:
            for connection in self._companion.open_connections:
                begin_before_savepoint(connection)
        return begin(self, LockedTransaction, nested=nested)

    @override
    @_locked
    def connection(self, *args: Any, **kwargs: Any) -> Connection:
        connection = super().connection(*args, **kwargs)
        _begin_on_server(connection)
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
    @_locked
    def reset(self) -> None:
        if self.in_transaction():
            # As at the end of `async with get_session()`: the work would be lost, and a success
            # sent all the same.
            raise PrematureClose(self._companion.lock.database)
        super().reset()

    @_locked
    def discard(self) -> None:
        """Roll back what an error interrupted, and forget the objects."""
        super().reset()


class LockedTransaction(SessionTransaction):
    """What `session.begin()` and `session.begin_nested()` return."""

    @property
    def _companion(self) -> Companion:
        session: Any = self.session
        companion: Companion = session._companion
        return companion


def _begin_on_server(connection: Connection) -> None:
    """Send BEGIN before the application works on the driver's own connection (COPY).

    For asyncpg, SQLAlchemy sends BEGIN together with the first statement that it knows of.
    """
    if connection.dialect.driver == "asyncpg":
        driver: Any = connection.connection.driver_connection
        if not driver.is_in_transaction():
            cursor = connection.connection.cursor()
            cursor.execute("")
            cursor.close()


def begin_before_savepoint(connection: Connection) -> None:
    """Send BEGIN to SQLite before the first savepoint of a transaction.

    Python's driver sends it only before the first write, and not after a savepoint. RELEASE of that
    savepoint would then be a COMMIT, and a later ROLLBACK would find nothing to roll back.
    """
    if connection.dialect.name == "sqlite":
        driver: Any = connection.connection.driver_connection
        if driver.isolation_level is not None and not driver.in_transaction:
            connection.exec_driver_sql("BEGIN")


for _name in _OPERATIONS:
    if hasattr(Session, _name):
        setattr(GuardedSession, _name, _locked(getattr(Session, _name)))
for _name in ("close", "commit", "prepare", "rollback"):
    setattr(LockedTransaction, _name, _locked(getattr(SessionTransaction, _name)))
