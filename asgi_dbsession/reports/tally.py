"""Adds up the steps of one session: its statements, its COMMITs, and its waits for a connection."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from asgi_dbsession.session.companion import Step
from asgi_dbsession.session.read_only import PARTS_OF_BEGIN

from .call_site import CallSite
from .recording import ENDS

# What a session does in a span of time. `wait`: it waits for a connection of the pool. `hold`: it
# has a connection. `statement`, `commit`, `rollback`: it waits until the database has answered this
# command.
Kind: TypeAlias = Literal["wait", "hold", "statement", "commit", "rollback"]

# At most this many operations of a session (statements and waits, for example) are stored one by
# one. Of further operations, only sums are stored, to save memory.
MOST_STEPS = 200
# A COMMIT or ROLLBACK that takes less time than this (in seconds) has probably sent nothing to a
# server. So it is not shown.
_NOTHING = 50e-6
# Marks a COMMIT or ROLLBACK that failed, in the list of what a session did. The session still holds
# its connection after such a failure.
FAILED = "failed"
# Reports show the recorded operations `hold` and `prepare` under another name.
_SHOWN_AS: dict[str, Kind] = {
    # `hold` is recorded when a session has got a connection. Its start and stop say how long the
    # session waited for this connection. So show it as `wait`.
    "hold": "wait",
    # The first half of a two-phase COMMIT.
    "prepare": "commit",
}


class Span(NamedTuple):
    """One thing that a session did, from `start` to `stop` (times of Python's `perf_counter`).

    Attributes:
        call_site: The line of the application that led to the statement, COMMIT or ROLLBACK.
        statement: The SQL text of a statement, without the values of its parameters.
    """

    kind: Kind
    start: float
    stop: float
    call_site: CallSite
    statement: str


class Tally:
    """What one session did between two commits or rollbacks. All times are in seconds.

    Args:
        now: The present time. It counts as the end of a statement that is still running.
        has_ended: True if the unit of work has ended, so the session holds no connection.

    Attributes:
        began: When the session asked for a connection for the first time.
        since: When the session got the connection that it is holding, if any.
        in_transaction: True if a statement was sent since the last COMMIT or ROLLBACK.
    """

    # Defaults are class attributes, because setting them for each session would cost time.
    commits: int = 0
    statements: int = 0
    operation_duration: float = 0
    wait_time: float = 0
    use_time: float = 0
    idle_time: float = 0
    idle_after: CallSite = None
    idle_before: CallSite = None
    since: float | None = None
    in_transaction: bool = False
    _idle_since: float = 0
    _line: CallSite = None

    def __init__(self, steps: Sequence[Step], now: float, *, has_ended: bool = False) -> None:
        self._holds: list[tuple[float, float]] = []
        if steps and steps[0][0] == "sum":
            vars(self).update(vars(steps[0][4]), _holds=steps[0][4]._holds[:])
            self._steps: Sequence[Step] = [*self._steps, *steps[1:]][:MOST_STEPS]
            steps = steps[1:]
        else:
            self._steps = steps
        self.began: float = self._steps[0][1] if self._steps else now
        for kind, start, stop, call_site, text in steps:
            if kind == "wait":
                self.wait_time += stop - start
            elif kind == "hold":
                self._leave(start)
                self.wait_time += stop - start
                self.since = self._idle_since = stop
                self._line = None
            # SQLAlchemy may send a two-phase COMMIT as a statement. Then both the COMMIT and,
            # inside of it, the statement are recorded. Ignore the inner one, so that the COMMIT is
            # counted once.
            elif start >= self._idle_since and (self.since is not None or kind == "statement"):
                self._operate(kind, start, stop or now, call_site, text)
        if has_ended:
            self._leave(now)

    def _operate(
        self, kind: str, start: float, stop: float, call_site: CallSite, text: str
    ) -> None:
        # Usually a session holds no connection after a COMMIT. But here the application has called
        # `commit()` on the connection itself, and has then sent another statement. So the session
        # still holds the connection.
        if self.since is None:
            self.since = self._idle_since = start
        idle_time = start - self._idle_since
        if idle_time > self.idle_time:
            self.idle_time, self.idle_after, self.idle_before = idle_time, self._line, call_site
        self._idle_since, self._line = stop, call_site
        if kind == "statement":
            self.in_transaction = True
            self.statements += text not in PARTS_OF_BEGIN
        if self.in_transaction:
            self.operation_duration += stop - start
        if kind in ENDS and text != FAILED:
            self.commits += self.in_transaction and kind == "commit"
            self._leave(stop)

    def _leave(self, now: float) -> None:
        if self.since is not None:
            self.use_time += now - self.since
            if len(self._holds) < MOST_STEPS:
                self._holds.append((self.since, now))
            self.since, self.in_transaction = None, False

    def spans(self) -> Iterator[Span]:
        """Yield what the session did and when: one `Span` for each statement or wait, for example.

        To save memory, only the first `MOST_STEPS` statements, waits and the like were stored.
        """
        for start, stop in self._holds:
            yield Span("hold", start, stop, None, "")
        for kind, start, stop, call_site, text in self._steps:
            # In autocommit mode, COMMIT sends nothing and takes almost no time. So the report does
            # not show such a COMMIT.
            if stop is not None and (kind not in ENDS or stop - start > _NOTHING):
                yield Span(_SHOWN_AS.get(kind) or kind, start, stop, call_site, text)


def condense(steps: list[Step]) -> None:
    """Shorten the list of what a session did, to save memory.

    The last entry stays. All others are replaced by one entry with a `Tally`: the sums of their
    times, and the first `MOST_STEPS` of them.
    """
    steps[:-1] = [["sum", 0, 0, None, Tally(steps[:-1], steps[-1][1])]]
