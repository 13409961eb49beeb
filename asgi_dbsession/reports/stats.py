"""What one session asks of its database, and how long that takes."""

from contextvars import ContextVar
from time import perf_counter
from typing import Any, Literal, NamedTuple, TypeAlias

from sqlalchemy.pool import ConnectionPoolEntry

from asgi_dbsession.session.lock import End, SessionLock
from asgi_dbsession.session.managed import ManagedSession

from .call_site import CallSite, find_call_site

# What a stretch of time was spent with; `hold` is from checkout to checkin, and contains the others
# but `wait`.
Kind: TypeAlias = Literal["wait", "hold", "statement", "commit", "rollback"]

# More stretches of one unit of work are not kept, whatever it does.
_MOST_STRETCHES = 200


class Stretch(NamedTuple):
    """A stretch of time, of one kind; times as of `perf_counter`.

    Attributes:
        call_site: The line of the application that sent it.
        statement: As it was compiled, without the values of its parameters.
    """

    kind: Kind
    start: float
    stop: float
    call_site: CallSite
    statement: str


_Stretch: TypeAlias = tuple[Kind, float, float, CallSite, str]


class Tally:
    """What was asked in one piece of work, between two ends; times in seconds.

    Attributes:
        stretches: See `all_stretches`; in the order in which they ended, and empty unless wanted.
    """

    # On the class, because every session pays for each attribute of its own.
    commits: int = 0
    statements: int = 0
    operation_duration: float = 0
    wait_time: float = 0
    use_time: float = 0
    idle_time: float = 0
    idle_after: CallSite = None
    idle_before: CallSite = None
    stretches: list[_Stretch] | tuple[()] = ()

    def keep(self, stretch: _Stretch) -> None:
        """Keep a stretch of time, or drop it if there are too many."""
        stretches = self.stretches
        if not stretches:
            self.stretches = [stretch]
        elif len(stretches) < _MOST_STRETCHES:
            stretches.append(stretch)

    def all_stretches(self) -> list[Stretch]:
        """The stretches; they are kept as plain tuples, which are made sooner."""
        return [Stretch(*each) for each in self.stretches]


class SessionStats:
    """What a session asked since the last end of its work.

    All that observe a session share its statistics: see `stats_of`.

    Args:
        lock: The lock of the session.

    Attributes:
        tally: The work since the last end.
        checkout: The connection that the session has now.
        asked: Since when it waits for a connection.
        keeps_stretches: Whether somebody wants to know when each operation began and ended.
    """

    keeps_stretches: bool = False
    checkout: "Checkout | None" = None
    asked: float | None = None
    _settled: tuple[End | None, Tally] = (None, Tally())

    def __init__(self, lock: SessionLock) -> None:
        self.lock: SessionLock = lock
        self.tally: Tally = Tally()

    @property
    def waits_since(self) -> float | None:
        """Since when it waits for a connection; None if it does not."""
        return self.asked if self.checkout is None and self.lock.is_busy else None

    def settle(self, end: End, now: float) -> Tally:
        """What was asked until this end. Each observer gets the same, and counting starts anew."""
        settled_by, tally = self._settled
        if settled_by is not end:
            self.stop_waiting(now)  # in vain: the pool was exhausted, or the database is gone
            tally = self.tally
            self._settled = end, tally
            self.tally = Tally()
        return tally

    def stop_waiting(self, now: float) -> None:
        """Count what it waited so far, in vain or not."""
        asked = self.asked
        if asked is not None:
            self.tally.wait_time += now - asked
            self.asked = None
            if self.keeps_stretches:
                self.tally.keep(("wait", asked, now, None, ""))


# Which session of this context waits: the pool tells of a checkout, but not for whom.
asking: ContextVar[SessionStats | None] = ContextVar("asgi_dbsession.asking", default=None)


def stats_of(opened: ManagedSession[Any]) -> SessionStats:
    """The statistics of a session; the first caller makes them.

    SQLAlchemy asks a session for its bind right before it checks out a connection, and tells of the
    checkout only when it is done.
    """
    companion = opened.companion
    if companion.stats is not None:
        found: SessionStats = companion.stats
        return found
    own: Any = opened.orm.bind
    lock = opened.lock
    stats = companion.stats = SessionStats(lock)

    def record_bind(bind: Any) -> None:
        # Outside of an operation, it is the application that asks.
        is_asked = stats.checkout is None and lock.is_busy
        if is_asked and bind.engine.pool is own.engine.pool:
            stats.asked = perf_counter()
            asking.set(stats)

    companion.bind_asked = record_bind
    return stats


class Checkout:
    """A connection while a session has it.

    Args:
        stats: Of that session.
        now: When it was checked out.
        entry: Its place in the pool.

    Attributes:
        since: When it was checked out.
        busy_since: When the operation under way began; None while it is idle.
        idle_since: When the last operation ended.
        call_site: The line that sent the operation under way, or the last one.
        statement: What it sent.
        in_transaction: Whether anything was sent since the last COMMIT or ROLLBACK.
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

    def begin_statement(self, context: Any, statement: str) -> None:
        """A statement begins."""
        # As compiled: with values in it, a list (`IN`) is another statement for each length.
        compiled = context.compiled
        self.stats.tally.statements += 1
        self.in_transaction = True
        self.begin("statement", statement if compiled is None else compiled.string)

    def begin(self, kind: Kind, statement: str = "") -> None:
        """An operation begins."""
        now, stats = perf_counter(), self.stats
        stats.asked = None
        tally, call_site = stats.tally, find_call_site()
        if now - self.idle_since > tally.idle_time:
            tally.idle_time = now - self.idle_since
            tally.idle_after, tally.idle_before = self.call_site, call_site
        self.call_site, self.kind, self.statement = call_site, kind, statement
        self.busy_since = now

    def done(self) -> None:
        """The operation, if any, has ended."""
        began = self.busy_since
        if began is not None:
            now, tally = perf_counter(), self.stats.tally
            self.busy_since, self.idle_since = None, now
            tally.operation_duration += now - began
            if self.stats.keeps_stretches:
                tally.keep((self.kind, began, now, self.call_site, self.statement))

    def give_back(self) -> None:
        """The connection goes back into its pool."""
        self.done()
        now, stats = perf_counter(), self.stats
        stats.tally.use_time += now - self.since
        if stats.keeps_stretches:
            stats.tally.keep(("hold", self.since, now, None, ""))
        if stats.checkout is self:
            stats.checkout = None
