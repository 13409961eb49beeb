"""The statements and times of one session between two commits or rollbacks."""

from typing import Literal, NamedTuple, TypeAlias

from .call_site import CallSite

# What a session used a measured time for. `hold` is the time from checkout to checkin of a
# connection, which includes all other kinds except `wait` (for a connection).
Kind: TypeAlias = Literal["wait", "hold", "statement", "commit", "rollback"]

# A unit of work stores at most this many spans, to bound the memory of a long one.
_MOST_SPANS = 200


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


_Span: TypeAlias = tuple[Kind, float, float, CallSite, str]


class Tally:
    """The statements and times between two commits or rollbacks of a session, in seconds.

    Attributes:
        spans: The measured times, in the order in which they ended; only with `keeps_spans`.
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
    spans: list[_Span] | tuple[()] = ()

    def keep(self, span: _Span) -> None:
        """Store a measured time, unless the largest number of times is stored already."""
        spans = self.spans
        if not spans:
            self.spans = [span]
        elif len(spans) < _MOST_SPANS:
            spans.append(span)

    def all_spans(self) -> list[Span]:
        """Convert the measured times to named tuples; they are stored as plain tuples for speed."""
        return [Span(*each) for each in self.spans]
