"""The statements and times of one session between two commits or rollbacks."""

from typing import Literal, NamedTuple, TypeAlias

from .call_site import CallSite

# What a session did in a measured time. `wait`: it waited for a connection. `hold`: it held a
# connection, from checkout to checkin; this time includes the statements, COMMIT and ROLLBACK.
Kind: TypeAlias = Literal["wait", "hold", "statement", "commit", "rollback"]

# At most this many spans are stored for each session, so that a long unit of work does not fill the
# memory.
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
        """Store a measured time, unless `_MOST_SPANS` times are stored already."""
        spans = self.spans
        if not spans:
            self.spans = [span]
        elif len(spans) < _MOST_SPANS:
            spans.append(span)

    def all_spans(self) -> list[Span]:
        """Convert the measured times to named tuples; they are stored as plain tuples for speed."""
        return [Span(*each) for each in self.spans]
