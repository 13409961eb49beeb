"""Counts how long units of work waited for connections and held connections, for the metrics."""

from bisect import bisect_left

from asgi_dbsession.reports.tally import Tally

# The upper limits of the histogram buckets, in seconds. OpenTelemetry recommends them for the
# metric `db.client.operation.duration`.
BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)


class Histogram:
    """A histogram of durations: how many fall into each bucket, and the sum of all durations.

    Attributes:
        counts: How many durations fall into each bucket. Bucket i is for durations above
            `BOUNDS[i - 1]` and up to `BOUNDS[i]`. The last bucket is for all longer durations.
    """

    def __init__(self) -> None:
        self.counts: list[int] = [0] * (len(BOUNDS) + 1)
        self.total: float = 0

    def add(self, duration: float) -> None:
        """Add a duration in seconds to its bucket and to the sum."""
        self.counts[bisect_left(BOUNDS, duration)] += 1
        self.total += duration


class Totals:
    """Sums for the metrics of one database. They only grow, and are never reset.

    Attributes:
        timeouts: How often a session got no connection within `pool_timeout`.
        waited: A histogram of how long each unit of work waited for connections. Units of work that
            did not wait are not counted.
        used: A histogram of how long each unit of work held connections. Units of work that held no
            connection are not counted.
    """

    def __init__(self) -> None:
        self.timeouts: int = 0
        self.waited: Histogram = Histogram()
        self.used: Histogram = Histogram()

    def add(self, tally: Tally) -> None:
        """Add the times of one unit of work to the histograms `waited` and `used`."""
        if tally.wait_time:
            self.waited.add(tally.wait_time)
        if tally.use_time:
            self.used.add(tally.use_time)
