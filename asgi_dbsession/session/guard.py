"""Session classes that hold a lock during each operation, so that operations never overlap."""

import asyncio
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Connection, TextClause, UpdateBase
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import greenlet_spawn
from typing_extensions import override

from asgi_dbsession.errors import ConfigurationError, PrematureClose

from ._sqlalchemy import NamingSession, begin
from .companion import Companion
from .completion import run_to_completion
from .failures import discard
from .reads import begin_now, begin_on_server
from .sqlite import begin_before_savepoint

R = TypeVar("R")
A = TypeVar("A", bound=AsyncSession)
S = TypeVar("S", bound=Session)
T = TypeVar("T")

# The methods of a SQLAlchemy session that may send SQL statements. Some of these methods do not
# exist in older versions of SQLAlchemy.
_STATEMENTS = ("execute", "scalar", "scalars")
_BULK_OPERATIONS = ("bulk_insert_mappings", "bulk_save_objects", "bulk_update_mappings")
_OPERATIONS = (
    "commit",
    "delete",
    "delete_all",
    "flush",
    "get",
    "get_one",
    "invalidate",
    "merge",
    "merge_all",
    "prepare",
    "refresh",
    "rollback",
)


# SQL text, INSERT, UPDATE and DELETE always need a transaction. BEGIN is never delayed for them.
_NEVER_PLAIN = (TextClause, UpdateBase)


def guarded_class(session_class: type[S]) -> type[S]:
    """Derive a session class whose operations hold the session's lock, lazy loading included."""
    bases = (GuardedSession,) if session_class is Session else (session_class, GuardedSession)
    return derive(session_class, bases, {})


def guarded_async_class(session_class: type[A]) -> type[A]:
    """Derive an `AsyncSession` class whose methods raise an error if a `def` function calls them.

    In a `def` function, `session.execute(…)` would only return a coroutine that nobody awaits, and
    the statement would not be sent.
    """
    methods = {
        name: _on_event_loop(method)
        for name, method in inspect.getmembers(session_class, inspect.iscoroutinefunction)
        if not name.startswith("_") and name != "close"
    }
    return derive(session_class, (_ClosingAsyncSession, session_class), methods)


def derive(session_class: type[T], bases: tuple[type, ...], methods: dict[str, Any]) -> type[T]:
    """Derive a session class with the same name, so that logs show the name that users know."""
    named = {"__module__": session_class.__module__, **methods}
    derived: type[T] = types.new_class(
        session_class.__name__, bases, exec_body=lambda body: body.update(named)
    )
    return derived


def locked(
    operation: Callable[..., R], check: Callable[..., None] | None = None
) -> Callable[..., R]:
    """Wrap a method of a session or transaction, so that it holds the session's lock while it runs.

    Args:
        operation: The method to wrap.
        check: A function to call before the method. It gets the `Companion` of the session (this
            package's data) and the arguments of the method.
    """

    @functools.wraps(operation)
    def operate_locked(self: Any, *args: Any, **kwargs: Any) -> R:
        companion: Companion = self._companion
        lock = companion.lock
        is_outermost = lock.acquire()
        try:
            if check is not None:
                check(companion, *args, **kwargs)
            return operation(self, *args, **kwargs)
        except BaseException as error:
            if companion.unit is not None:
                companion.operation_failed(error)
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
    """An `AsyncSession` whose `close()` never hides an exception that the application raised."""

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


class GuardedSession(NamingSession):
    """The base class of all sessions of this package. Each operation holds the session's lock."""

    _companion: Companion
    # The module `managed.py` sets the class attribute `transaction_class`. An import of that class
    # into this module would be a circular import.

    @override
    def add(self, instance: object, *args: Any, **kwargs: Any) -> None:
        self._companion.lock.record_user()
        super().add(instance, *args, **kwargs)

    @override
    @locked
    def begin(self, nested: bool = False) -> SessionTransaction:
        # This method holds the lock, so that SAVEPOINT is never sent in the middle of a commit or
        # rollback.
        if nested:
            for connection in self._companion.open_connections:
                begin_before_savepoint(connection)
        return begin(self, self.transaction_class, nested=nested)

    @override
    @locked
    def connection(self, *args: Any, **kwargs: Any) -> Connection:
        connection = super().connection(*args, **kwargs)
        begin_now(connection)
        try:
            begin_on_server(connection)
        except BaseException:
            # BEGIN may have been cancelled after it reached the server. SQLAlchemy does not know
            # this, and would give the pool a connection with an open transaction. So close the
            # connection.
            discard(connection)
            raise
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
            # The application called `close()` or left `async with session:` before its work was
            # committed. The close would lose the work, and the client would still get a success
            # status.
            raise PrematureClose(self._companion.lock.database)
        super().reset()

    @locked
    def discard(self) -> None:
        """Roll back the work that an exception interrupted, and empty the session."""
        super().reset()


def _check_statement(
    companion: Companion, statement: object = None, *_: object, **__: object
) -> None:
    companion.expects_read = not isinstance(statement, _NEVER_PLAIN)
    if companion.writes.forbidden:
        companion.writes.check_statement(statement)


def _bulk_check(name: str) -> Callable[..., None]:
    def check(companion: Companion, *_: object, **__: object) -> None:
        if companion.writes.forbidden:
            raise companion.writes.refuse(f"`{name}()`")

    return check


_checks: dict[str, Callable[..., None] | None] = {
    **dict.fromkeys(_OPERATIONS),
    **dict.fromkeys(_STATEMENTS, _check_statement),
    **{name: _bulk_check(name) for name in _BULK_OPERATIONS},
}
for _name, _check in _checks.items():
    if hasattr(Session, _name):
        setattr(GuardedSession, _name, locked(getattr(Session, _name), _check))
