"""What all units of work of a database took, since the page was made."""

from bisect import bisect_left

from asgi_dbsession.reports.stats import Tally

# The upper bounds, in seconds, which OpenTelemetry recommends for `db.client.operation.duration`.
BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)


class Histogram:
    """How many durations were up to each of the bounds, and their sum.

    Attributes:
        counts: Of the durations up to each bound and above the one before; the last is of those
            above all bounds.
    """

    def __init__(self) -> None:
        self.counts: list[int] = [0] * (len(BOUNDS) + 1)
        self.total: float = 0

    def add(self, duration: float) -> None:
        """Count one duration, in seconds."""
        self.counts[bisect_left(BOUNDS, duration)] += 1
        self.total += duration


class Totals:
    """Counts that only grow.

    Attributes:
        timeouts: How often no connection became free in time.
        waited: How long units waited for connections; those that asked for one.
        used: How long units held connections; those that had one.
    """

    def __init__(self) -> None:
        self.timeouts: int = 0
        self.waited: Histogram = Histogram()
        self.used: Histogram = Histogram()

    def add(self, tally: Tally) -> None:
        """Count what one unit took."""
        if tally.wait_time:
            self.waited.add(tally.wait_time)
        if tally.use_time:
            self.used.add(tally.use_time)
