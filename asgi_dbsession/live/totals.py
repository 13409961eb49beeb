"""Counts the time and connections of all units of work, for metrics."""

from bisect import bisect_left

from asgi_dbsession.reports.tally import Tally

# The upper bounds of each histogram, in seconds, which OpenTelemetry recommends for
# `db.client.operation.duration`.
BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)


class Histogram:
    """A histogram of durations: a count for each bound, and the sum of all durations.

    Attributes:
        counts: For each bound, the number of durations above the previous bound and up to this
            bound. The last number counts the durations above all bounds.
    """

    def __init__(self) -> None:
        self.counts: list[int] = [0] * (len(BOUNDS) + 1)
        self.total: float = 0

    def add(self, duration: float) -> None:
        """Add a duration, in seconds, to the count of its bound and to the sum."""
        self.counts[bisect_left(BOUNDS, duration)] += 1
        self.total += duration


class Totals:
    """The counts of one database; they are never reset.

    Attributes:
        timeouts: How often no connection became free within the `pool_timeout`.
        waited: How long units waited for connections; only units that waited are counted.
        used: How long units held connections; only units that held a connection are counted.
    """

    def __init__(self) -> None:
        self.timeouts: int = 0
        self.waited: Histogram = Histogram()
        self.used: Histogram = Histogram()

    def add(self, tally: Tally) -> None:
        """Add the waiting time and the holding time of one unit of work."""
        if tally.wait_time:
            self.waited.add(tally.wait_time)
        if tally.use_time:
            self.used.add(tally.use_time)
