"""Adds up the steps of one session between two commits or rollbacks."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from asgi_dbsession.session.companion import Step
from asgi_dbsession.session.read_only import PARTS_OF_BEGIN
from asgi_dbsession.session.recording import ENDS

from .call_site import CallSite

# What a session did in a measured time. `wait`: it waited for a connection. `hold`: it held a
# connection, from checkout to checkin; this time includes the statements, COMMIT and ROLLBACK.
Kind: TypeAlias = Literal["wait", "hold", "statement", "commit", "rollback"]

# At most this many steps are stored for each session, so that a long unit of work does not fill the
# memory. Further steps are only added up.
MOST_STEPS = 200
# A COMMIT or ROLLBACK that takes at most so many seconds has sent nothing to a server.
_NOTHING = 50e-6
# The text of a COMMIT or ROLLBACK that failed.
FAILED = "failed"
# How kinds of steps are shown, if their own name is not a `Kind`.
_SHOWN_AS: dict[str, Kind] = {"hold": "wait", "prepare": "commit"}


class Span(NamedTuple):
    """A measured time from `start` to `stop`, both from `perf_counter`, of one `kind`.

    Attributes:
        call_site: The line of the application that caused the operation.
        statement: The compiled statement, without the values of its parameters.
    """

    kind: Kind
    start: float
    stop: float
    call_site: CallSite
    statement: str


class Tally:
    """The statements and times between two commits or rollbacks of a session, in seconds.

    Args:
        steps: The steps of the session, in the order in which they began.
        now: The end of a step that still runs.
        has_ended: True if the unit of work has ended now, so that the session holds no connection.

    Attributes:
        began: When the session first asked for a connection.
        since: When the session got the connection that it holds; None if it holds none.
        in_transaction: True if a statement was sent since the last COMMIT or ROLLBACK.
    """

    # These defaults are class attributes, so that a session does not spend time on setting them.
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
            # A step inside of another step is skipped: COMMIT may be sent as a statement.
            elif start >= self._idle_since and (self.since is not None or kind == "statement"):
                self._operate(kind, start, stop or now, call_site, text)
        if has_ended:
            self._leave(now)

    def _operate(
        self, kind: str, start: float, stop: float, call_site: CallSite, text: str
    ) -> None:
        if self.since is None:  # the application has committed on the connection itself
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
        """Iterate over the measured times of at most `MOST_STEPS` steps."""
        for start, stop in self._holds:
            yield Span("hold", start, stop, None, "")
        for kind, start, stop, call_site, text in self._steps:
            # COMMIT of a connection in autocommit sends nothing, and so takes almost no time.
            if stop is not None and (kind not in ENDS or stop - start > _NOTHING):
                yield Span(_SHOWN_AS.get(kind) or kind, start, stop, call_site, text)


def condense(steps: list[Step]) -> None:
    """Replace all steps but the last by their sums, in place."""
    steps[:-1] = [["sum", 0, 0, None, Tally(steps[:-1], steps[-1][1])]]
