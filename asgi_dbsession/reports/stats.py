"""Measures the statements and times of one session."""

from collections.abc import Callable
from contextvars import ContextVar
from time import perf_counter
from typing import Any
from weakref import ref

from sqlalchemy.pool import ConnectionPoolEntry

from asgi_dbsession.session.lock import End, SessionLock
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.read_only import PARTS_OF_BEGIN

from .call_site import BELOW_EXECUTE, CallSite, find_call_site
from .tally import Kind, Tally


class SessionStats:
    """The statistics of a session since its last commit or rollback.

    All observers of a session share one object, which `stats_of` creates.

    Args:
        lock: The lock of the session.

    Attributes:
        tally: The totals since the last commit or rollback.
        checkout: The connection that the session holds now; None without a connection.
        pool: The pool from which the session last requested a connection.
        asked: The time at which the session began to wait for a connection; None without a wait.
        keeps_spans: True if an observer needs the start and end of each operation.
    """

    keeps_spans: bool = False
    checkout: "Checkout | None" = None
    asked: float | None = None
    pool: Any = None
    _settled: tuple[Callable[[], End | None], Tally] = (lambda: None, Tally())

    def __init__(self, lock: SessionLock) -> None:
        self.lock: SessionLock = lock
        self.tally: Tally = Tally()

    @property
    def waits_since(self) -> float | None:
        """The time at which the session began to wait for a connection; None without a wait."""
        return self.asked if self.checkout is None and self.lock.is_busy else None

    def has_measured(self, end: End) -> bool:
        """Return True if anything was measured between the last commit or rollback and `end`."""
        settled_by, tally = self._settled
        if settled_by() is end:  # another observer has called `settle` with this `end` already
            return bool(tally.spans)
        return bool(self.tally.spans) or self.asked is not None

    def settle(self, end: End, now: float) -> Tally:
        """Return the totals collected up to the commit or rollback `end`, and start new totals.

        All observers that pass the same `end` get the same totals.
        """
        settled_by, tally = self._settled
        if settled_by() is not end:
            # The session may still be waiting for a connection, because the pool is full or the
            # database is unreachable.
            self.stop_waiting(now)
            tally = self.tally
            # Use a weak reference, because a strong reference would make a circle: `end` refers to
            # its error, the error to the request, and the request to these statistics.
            self._settled = ref(end), tally
            self.tally = Tally()
        return tally

    def stop_waiting(self, now: float) -> None:
        """Stop measuring the wait for a connection, and add the waiting time to the totals."""
        asked = self.asked
        if asked is not None:
            self.tally.wait_time += now - asked
            self.asked = None
            if self.keeps_spans:
                self.tally.keep(("wait", asked, now, None, ""))


# The statistics of the session that is about to check out a connection. The pool reports each
# checkout, but not the session that caused it.
asking: ContextVar[SessionStats | None] = ContextVar("asgi_dbsession.asking", default=None)


def stats_of(opened: ManagedSession[Any]) -> SessionStats:
    """Return the statistics of a session; the first call creates them.

    A wait for a connection begins when SQLAlchemy calls the session's `get_bind`; SQLAlchemy
    reports the checkout only at the end of the wait.
    """
    companion = opened.companion
    if companion.stats is not None:
        found: SessionStats = companion.stats
        return found
    lock = opened.lock
    stats = companion.stats = SessionStats(lock)

    # With replicas, the session has no engine until its first statement chooses a server.
    own: Any = opened.orm.bind

    def record_bind(bind: Any) -> None:
        # Only a call of `get_bind` during an operation begins a wait. The application may call
        # `get_bind` itself, outside of any operation.
        is_asked = stats.checkout is None and lock.is_busy
        if is_asked and (own is None or bind.engine.pool is own.engine.pool):
            stats.pool = bind.engine.pool
            stats.asked = perf_counter()
            asking.set(stats)

    companion.bind_asked = record_bind
    return stats


class Checkout:
    """A connection that a session has checked out of its pool.

    Args:
        stats: The statistics of the session.
        now: The time of the checkout.
        entry: The pool entry of the connection.

    Attributes:
        since: The time of the checkout.
        busy_since: The start of the running operation; None if no operation runs.
        idle_since: The end of the last operation.
        call_site: The line of the application that caused the running or the last operation.
        statement: The SQL text of the running or the last operation.
        in_transaction: True if a statement was sent since the last COMMIT or ROLLBACK.
    """

    __slots__ = (
        "busy_since",
        "call_site",
        "entry",
        "idle_since",
        "in_transaction",
        "kind",
        "since",
        "statement",
        "stats",
    )

    def __init__(self, stats: SessionStats, now: float, entry: ConnectionPoolEntry) -> None:
        self.stats: SessionStats = stats
        self.entry: ConnectionPoolEntry = entry
        self.since: float = now
        self.idle_since: float = now
        self.busy_since: float | None = None
        self.call_site: CallSite = None
        self.kind: Kind = "statement"
        self.statement: str = ""
        self.in_transaction: bool = False

    @property
    def is_in_autocommit(self) -> bool:
        """True if the driver is in autocommit mode, so that no transaction is open."""
        return getattr(self.entry.dbapi_connection, "autocommit", None) is True

    def begin_statement(self, context: Any, statement: str) -> None:
        """Record the start of a statement."""
        compiled = context.compiled
        self.stats.tally.statements += statement not in PARTS_OF_BEGIN
        self.in_transaction = True
        if compiled is None:
            self.begin("statement", statement, find_call_site())
        else:
            # Use the compiled text, because the final text of an `IN` list differs for each number
            # of values.
            self.begin("statement", compiled.string, find_call_site(BELOW_EXECUTE))

    def begin(self, kind: Kind, statement: str, call_site: CallSite) -> None:
        """Record the start of a statement, COMMIT or ROLLBACK."""
        now = perf_counter()
        self.stats.asked = None
        self.record_idle(now, call_site)
        self.call_site, self.kind, self.statement = call_site, kind, statement
        self.busy_since = now

    def record_idle(self, now: float, call_site: CallSite) -> None:
        """Store the idle time if it is the longest, with the lines of code before and after it."""
        tally, idle_time = self.stats.tally, now - self.idle_since
        if idle_time > tally.idle_time:
            tally.idle_time = idle_time
            tally.idle_after, tally.idle_before = self.call_site, call_site

    def done(self) -> None:
        """Record the end of the running operation; do nothing if no operation is running."""
        began = self.busy_since
        if began is not None:
            now, tally = perf_counter(), self.stats.tally
            self.busy_since, self.idle_since = None, now
            tally.operation_duration += now - began
            if self.stats.keeps_spans:
                tally.keep((self.kind, began, now, self.call_site, self.statement))

    def give_back(self) -> None:
        """Record the return of the connection to its pool, and add its use to the totals."""
        self.done()
        now, stats = perf_counter(), self.stats
        stats.tally.use_time += now - self.since
        if stats.keeps_spans:
            stats.tally.keep(("hold", self.since, now, None, ""))
        if stats.checkout is self:
            stats.checkout = None
