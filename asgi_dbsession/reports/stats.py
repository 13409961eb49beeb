"""What one session asks of its database, and how long that takes."""

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from time import perf_counter
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry

from asgi_dbsession.session.managed import ManagedSession

from .call_site import CallSite, find_call_site

# Where a connection keeps who has it.
_KEY = "asgi_dbsession.checkout"


class SessionStats:
    """What was asked since it was last told; times in seconds.

    Attributes:
        checkout: The connection that the session has now.
        asked: Since when it waits for one.
    """

    def __init__(self) -> None:
        self.checkout: Checkout | None = None
        self.asked: float | None = None
        self.reset()

    def reset(self) -> None:
        """Count from nothing again."""
        self.commits: int = 0
        self.statements: int = 0
        self.operation_duration: float = 0
        self.wait_time: float = 0
        self.use_time: float = 0
        self.idle_time: float = 0
        self.idle_after: CallSite = None
        self.idle_before: CallSite = None

    def attach(self, opened: ManagedSession[Any]) -> None:
        """Count what is done on a session that was just made.

        SQLAlchemy asks a session for its bind right before it checks out a connection, and tells
        of the checkout only when it is done.
        """
        own: Any = opened.orm.bind
        lock = opened.lock

        def record_bind(bind: Any) -> None:
            # Outside of an operation, it is the application that asks.
            is_asked = self.checkout is None and lock.is_busy
            if is_asked and bind.engine.pool is own.engine.pool:
                self.asked = perf_counter()
                _asking.set(self)

        opened.companion.bind_asked = record_bind

    def stop_waiting(self, now: float) -> None:
        """Count what it waited so far, in vain or not."""
        if self.asked is not None:
            self.wait_time += now - self.asked
            self.asked = None


class Checkout:
    """A connection while a session has it.

    Args:
        stats: Of that session.
        now: When it was checked out.
    """

    __slots__ = ("_busy", "_call_site", "_free", "_since", "is_committing", "stats")

    def __init__(self, stats: SessionStats, now: float) -> None:
        self.stats: SessionStats = stats
        self.is_committing: bool = False
        self._since = self._free = now
        self._busy: float | None = None
        self._call_site: CallSite = None

    def begin(self) -> None:
        """An operation begins."""
        now, stats = perf_counter(), self.stats
        stats.asked = None
        if self._busy is not None:
            stats.operation_duration += now - self._busy
            self._free = now
        call_site = find_call_site()
        if now - self._free > stats.idle_time:
            stats.idle_time = now - self._free
            stats.idle_after, stats.idle_before = self._call_site, call_site
        self._call_site, self._busy = call_site, now

    def done(self) -> None:
        """The operation, if any, is over."""
        if self._busy is not None:
            self._free = perf_counter()
            self.stats.operation_duration += self._free - self._busy
            self._busy = None

    def give_back(self) -> None:
        """The connection goes back into its pool."""
        self.done()
        self.stats.use_time += perf_counter() - self._since
        if self.stats.checkout is self:
            self.stats.checkout = None


_asking: ContextVar[SessionStats | None] = ContextVar("asgi_dbsession.asking", default=None)


def watch_usage(engine: Engine) -> None:
    """Have `engine` tell what is asked of it; watching twice is watching once."""
    for name, listener in _listeners():
        event.listen(engine, name, listener)


def unwatch_usage(engine: Engine) -> None:
    """Undo `watch_usage`, on an engine that goes on without this package."""
    for name, listener in _listeners():
        if event.contains(engine, name, listener):
            event.remove(engine, name, listener)


def _listeners() -> Iterator[tuple[str, Callable[..., None]]]:
    yield "checkout", _check_out
    yield "checkin", _check_in
    yield "before_cursor_execute", _begin_statement
    yield "after_cursor_execute", _done
    yield "handle_error", _fail
    for name in ("commit", "commit_twophase"):
        yield name, _begin_commit
    for name in ("rollback", "prepare_twophase", "rollback_twophase"):
        yield name, _begin


def _check_out(_connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
    stats = _asking.get()
    if stats is not None and stats.asked is not None:
        now = perf_counter()
        stats.stop_waiting(now)
        stats.asked = now  # a pool may take from another pool, and tell of both
        stats.checkout = record.info[_KEY] = Checkout(stats, now)


def _check_in(_connection: object, record: ConnectionPoolEntry) -> None:
    checkout: Checkout | None = record.info.pop(_KEY, None)
    if checkout is not None:
        checkout.give_back()


def _checkout_of(connection: Connection | None) -> Checkout | None:
    # One that was thrown away would be replaced by the mere question.
    if connection is None or connection.closed or connection.invalidated:
        return None
    checkout: Checkout | None = connection.info.get(_KEY)
    return checkout


def _begin_statement(connection: Connection, *_: object) -> None:
    checkout = _checkout_of(connection)
    if checkout is not None:
        checkout.stats.statements += 1
        checkout.begin()


def _begin_commit(connection: Connection, *_: object) -> None:
    checkout = _checkout_of(connection)
    if checkout is not None:
        checkout.stats.commits += 1
        checkout.is_committing = True
        checkout.begin()


def _begin(connection: Connection, *_: object) -> None:
    checkout = _checkout_of(connection)
    if checkout is not None:
        checkout.begin()


def _done(connection: Connection, *_: object) -> None:
    checkout = _checkout_of(connection)
    if checkout is not None:
        checkout.done()


def _fail(context: ExceptionContext) -> None:
    checkout = _checkout_of(context.connection)
    if checkout is not None:
        checkout.done()
        checkout.stats.commits -= checkout.is_committing
        checkout.is_committing = False
