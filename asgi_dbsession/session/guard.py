"""Session classes that hold a lock during each operation, so that operations never overlap."""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Connection, TextClause, UpdateBase
from sqlalchemy.orm import Session, SessionTransaction
from typing_extensions import Self, override

from asgi_dbsession.errors import PrematureClose

from ._sqlalchemy import ConnectingSession, ConnectingTransaction, SkippingEmptyFlush
from .companion import Companion
from .reads import begin_now, begin_on_server, may_have_written
from .roll_back import discard

R = TypeVar("R")
S = TypeVar("S", bound=Session)
T = TypeVar("T")

# The methods of a SQLAlchemy session that may send SQL. Older versions lack some of them.
_STATEMENTS = ("execute", "scalar", "scalars")
_BULK_OPERATIONS = ("bulk_insert_mappings", "bulk_save_objects", "bulk_update_mappings")
_OPERATIONS = (
    "commit",
    "delete",
    "delete_all",
    "flush",
    "get",
    "get_one",
    "merge",
    "merge_all",
    "prepare",
    "refresh",
    "rollback",
)
# These methods change what the next flush stores. They are not coroutines, so a task cannot wait in
# them until a running commit or rollback has ended. Their call is delayed instead.
_CHANGES = (
    "add",
    "add_all",
    "enable_relationship_loading",
    "expire",
    "expire_all",
    "expunge",
    "expunge_all",
)

# Statements that may write: `text("…")`, INSERT, UPDATE and DELETE. BEGIN is sent before them.
_NEVER_PLAIN = (TextClause, UpdateBase)


def guarded_class(session_class: type[S]) -> type[S]:
    """Derive a session class whose operations hold the session's lock, lazy loading included."""
    bases = (GuardedSession,) if session_class is Session else (session_class, GuardedSession)
    # SQLAlchemy calls `flush()` before each statement. This package's `flush()` takes time for the
    # lock, so skip it if there is nothing to flush. Never skip an application's own `flush()`.
    if session_class.flush is Session.flush:
        bases = (*bases, SkippingEmptyFlush)
    return derive(session_class, bases, {})


def derive(session_class: type[T], bases: tuple[type, ...], methods: dict[str, Any]) -> type[T]:
    """Derive a session class with the same name, so that logs show the name that users know."""
    named = {"__module__": session_class.__module__, **methods}
    derived: type[T] = types.new_class(
        session_class.__name__, bases, {}, lambda body: body.update(named)
    )
    return derived


def locked(
    operation: Callable[..., R], check: Callable[[Companion, object], None] | None = None
) -> Callable[..., R]:
    """Wrap a method of a session or transaction, so that it holds the session's lock while it runs.

    Args:
        operation: The method to wrap.
        check: A function to call before the method. It gets the `Companion` of the session (this
            package's data) and the statement that the method was given.
    """

    @functools.wraps(operation)
    def operate_locked(self: Any, *args: Any, **kwargs: Any) -> R:
        companion: Companion = self._companion
        lock = companion.lock
        is_outermost = lock.acquire()
        try:
            if check is not None:
                check(companion, args[0] if args else kwargs.get("statement"))
            return operation(self, *args, **kwargs)
        finally:
            if is_outermost:
                lock.release()

    return operate_locked


def _changing(change: Callable[..., None]) -> Callable[..., None]:
    """Wrap a method such as `add`. If a commit or rollback is running, call the method after it."""
    change_locked = locked(change)

    @functools.wraps(change)
    def change_or_delay(self: Any, *args: Any, **kwargs: Any) -> None:
        lock = self._companion.lock
        if not (lock.ends and lock.delay(change, self, *args, **kwargs)):
            change_locked(self, *args, **kwargs)

    return change_or_delay


class LockedTransaction(ConnectingTransaction):
    """The transaction object of `session.begin()`. Each operation holds the session's lock."""

    @property
    def _companion(self) -> Any:
        return vars(self.session)["_companion"]


for _name in ("close", "commit", "prepare", "rollback"):
    setattr(LockedTransaction, _name, locked(getattr(SessionTransaction, _name)))


class GuardedSession(ConnectingSession):
    """The base class of all sessions of this package. Each operation holds the session's lock."""

    _companion: Companion
    transaction_class: type[SessionTransaction] = LockedTransaction

    @override
    @locked
    def begin(self, nested: bool = False) -> SessionTransaction:
        # This method holds the lock, so that SAVEPOINT is never sent in the middle of a commit or
        # rollback.
        return super().begin(nested)

    @override
    @locked
    def connection(self, *args: Any, **kwargs: Any) -> Connection:
        self._companion.expects_read = False
        connection = super().connection(*args, **kwargs)
        begin_now(connection)
        try:
            begin_on_server(connection)
        except BaseException:
            # BEGIN may have been cancelled after it reached the server. SQLAlchemy does not know
            # this. So close the connection, and do not give it to the pool.
            discard(connection)
            raise
        return connection

    @override
    def close(self) -> None:
        self._close(self.reset if sys.exception() is None else self.close_after_error)

    @override
    def __enter__(self) -> Self:
        has_work = may_have_written(self)
        self._companion.begun_before = self.get_transaction() if has_work else None
        return super().__enter__()

    @override
    def __exit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if type(self).close is not GuardedSession.close:
            # The application has written its own `close()`, and expects that `with session:` calls
            # this method. SQLAlchemy's `__exit__` does so.
            super().__exit__(type_, value, traceback)
        else:
            self._close(self.reset if type_ is None else self.discard)

    def _close(self, close_now: Callable[[], None]) -> None:
        lock = self._companion.lock
        if lock.is_closed:
            return
        if lock.is_held_by_end_of_caller():
            # Do not check for uncommitted work: this package has just committed or rolled back.
            super().close()
        else:
            close_now()

    @override
    @locked
    def reset(self) -> None:
        if self.in_transaction():
            # The application called `close()` or left `async with session:` before its work was
            # committed. The close would lose the work, and the client would still get a success
            # status.
            raise PrematureClose(self._companion.lock.database)
        super().reset()

    @override
    @locked
    def invalidate(self) -> None:
        lock = self._companion.lock
        if not lock.is_held_by_end_of_caller() and may_have_written(self):
            raise PrematureClose(lock.database)
        super().invalidate()

    @locked
    def close_after_error(self) -> None:
        """Roll back the session, because `close()` was called while an exception was handled.

        The rollback may lose work that the application wants: a row that the exception handler has
        added, for example. An error raised now would hide the handled exception. So if work is
        lost, the later COMMIT of the request or `begin()` block raises `PrematureClose`.
        """
        companion = self._companion
        if may_have_written(self):
            companion.discarded = PrematureClose(companion.lock.database)
        super().reset()

    @locked
    def discard(self) -> None:
        """Roll back the work that an exception interrupted, and empty the session."""
        companion = self._companion
        begun, companion.begun_before = companion.begun_before, None
        if begun is not None and begun is self.get_transaction():
            companion.discarded = PrematureClose(companion.lock.database)
        super().reset()


def _check_statement(companion: Companion, statement: object) -> None:
    companion.expects_read = not isinstance(statement, _NEVER_PLAIN)
    if companion.read_only is not None:
        companion.read_only.check_statement(statement)


def _check_bulk_operation(name: str, companion: Companion, _: object) -> None:
    if companion.read_only is not None:
        raise companion.read_only.refuse(f"`{name}()`")


_checks: dict[str, Callable[[Companion, object], None] | None] = {
    **dict.fromkeys(_OPERATIONS),
    **dict.fromkeys(_STATEMENTS, _check_statement),
    **{name: functools.partial(_check_bulk_operation, name) for name in _BULK_OPERATIONS},
}
for _name, _check in _checks.items():
    if hasattr(Session, _name):
        setattr(GuardedSession, _name, locked(getattr(Session, _name), _check))
for _name in _CHANGES:
    setattr(GuardedSession, _name, _changing(getattr(Session, _name)))
