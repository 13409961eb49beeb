"""What one session asks of its database, and how long that takes."""

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from time import perf_counter
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from .call_site import Place, place_of_use

# Where a connection keeps who has it.
_KEY = "asgi_dbsession.hold"


class Usage:
    """What was asked since it was last told; times in seconds.

    Attributes:
        hold: The connection that the session has now.
        asked: Since when it waits for one.
    """

    def __init__(self) -> None:
        self.hold: Hold | None = None
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
        self.idle_after: Place = None
        self.idle_before: Place = None

    def follow(self, session: Session) -> None:
        """Count what is done on a session that was just made.

        SQLAlchemy asks a session for its bind right before it checks out a connection, and tells
        of a checkout only when it is done.
        """
        get_bind: Any = session.get_bind
        own: Any = session.bind

        def get_bind_and_note(*args: Any, **kwargs: Any) -> Any:
            bind = get_bind(*args, **kwargs)
            if self.hold is None and bind.engine.pool is own.engine.pool:
                self.asked = perf_counter()
                _asking.set(self)
            return bind

        vars(session)["get_bind"] = get_bind_and_note

    def stop_waiting(self, now: float) -> None:
        """Count what it waited so far, in vain or not."""
        if self.asked is not None:
            self.wait_time += now - self.asked
            self.asked = None


def forget(session: Session) -> None:
    """Undo `follow`, or only the garbage collector would ever free the session."""
    vars(session).pop("get_bind", None)


class Hold:
    """A connection while a session has it.

    Args:
        usage: Of that session.
        now: When it was checked out.
    """

    __slots__ = ("_busy", "_free", "_place", "_since", "is_committing", "usage")

    def __init__(self, usage: Usage, now: float) -> None:
        self.usage: Usage = usage
        self.is_committing: bool = False
        self._since = self._free = now
        self._busy: float | None = None
        self._place: Place = None

    def begin(self) -> None:
        """An operation begins."""
        now, usage = perf_counter(), self.usage
        usage.asked = None
        if self._busy is not None:
            usage.operation_duration += now - self._busy
            self._free = now
        place = place_of_use()
        if now - self._free > usage.idle_time:
            usage.idle_time = now - self._free
            usage.idle_after, usage.idle_before = self._place, place
        self._place, self._busy = place, now

    def done(self) -> None:
        """The operation, if any, is over."""
        if self._busy is not None:
            self._free = perf_counter()
            self.usage.operation_duration += self._free - self._busy
            self._busy = None

    def give_back(self) -> None:
        """The connection goes back into its pool."""
        self.done()
        self.usage.use_time += perf_counter() - self._since
        if self.usage.hold is self:
            self.usage.hold = None


_asking: ContextVar[Usage | None] = ContextVar("asgi_dbsession.asking", default=None)


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
    usage = _asking.get()
    if usage is not None and usage.asked is not None:
        now = perf_counter()
        usage.stop_waiting(now)
        usage.asked = now  # a pool may take from another pool, and tell of both
        usage.hold = record.info[_KEY] = Hold(usage, now)


def _check_in(_connection: object, record: ConnectionPoolEntry) -> None:
    hold: Hold | None = record.info.pop(_KEY, None)
    if hold is not None:
        hold.give_back()


def _hold_of(connection: Connection | None) -> Hold | None:
    # One that was thrown away would be replaced by the mere question.
    if connection is None or connection.closed or connection.invalidated:
        return None
    hold: Hold | None = connection.info.get(_KEY)
    return hold


def _begin_statement(connection: Connection, *_: object) -> None:
    hold = _hold_of(connection)
    if hold is not None:
        hold.usage.statements += 1
        hold.begin()


def _begin_commit(connection: Connection, *_: object) -> None:
    hold = _hold_of(connection)
    if hold is not None:
        hold.usage.commits += 1
        hold.is_committing = True
        hold.begin()


def _begin(connection: Connection, *_: object) -> None:
    hold = _hold_of(connection)
    if hold is not None:
        hold.begin()


def _done(connection: Connection, *_: object) -> None:
    hold = _hold_of(connection)
    if hold is not None:
        hold.done()


def _fail(context: ExceptionContext) -> None:
    hold = _hold_of(context.connection)
    if hold is not None:
        hold.done()
        hold.usage.commits -= hold.is_committing
        hold.is_committing = False
