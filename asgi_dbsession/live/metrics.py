"""Writes metrics in the text format of Prometheus, with the names of OpenTelemetry."""

from collections.abc import Iterator
from typing import Any

from .now import DatabaseNow
from .totals import BOUNDS, Histogram, Totals

_POOL = "db_client_connection_pool_name"
_STATE = "db_client_connection_state"


def render_metrics(databases: list[DatabaseNow], totals: list[Totals]) -> str | None:
    """Return metrics of the connection pools, as a text in the format of Prometheus.

    None if the package `prometheus-client` is not installed. The metrics have the names that
    OpenTelemetry defines: https://opentelemetry.io/docs/specs/semconv/database/database-metrics/
    """
    try:
        from prometheus_client import generate_latest
    except ImportError:
        return None
    return generate_latest(_Collector(databases, totals)).decode()


class _Collector:
    """Gives the metrics to prometheus-client's `generate_latest`, which calls `collect`."""

    def __init__(self, databases: list[DatabaseNow], totals: list[Totals]) -> None:
        self._databases = databases
        self._totals = totals

    def collect(self) -> Iterator[Any]:
        yield from self._of_now()
        yield from self._of_totals()

    def _of_now(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        count = GaugeMetricFamily(
            "db_client_connection_count", "Connections, by state.", labels=(_POOL, _STATE)
        )
        most = GaugeMetricFamily(
            "db_client_connection_max", "The largest number of connections.", labels=(_POOL,)
        )
        pending = GaugeMetricFamily(
            "db_client_connection_pending_requests",
            "Requests that wait for a connection.",
            labels=(_POOL,),
        )
        for each in self._databases:
            free = sum(lane["state"] == "free" for lane in each["connections"])
            count.add_metric((each["name"], "used"), each["in_use"])
            count.add_metric((each["name"], "idle"), free)
            pending.add_metric((each["name"],), len(each["waiting"]))
            if each["most"] is not None:
                most.add_metric((each["name"],), each["most"])
        yield from (count, most, pending)

    def _of_totals(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        timeouts = CounterMetricFamily(
            "db_client_connection_timeouts",
            "Timeouts while waiting for a connection.",
            labels=(_POOL,),
        )
        waited = HistogramMetricFamily(
            "db_client_connection_wait_time",
            "Time to get a connection.",
            labels=(_POOL,),
            unit="seconds",
        )
        used = HistogramMetricFamily(
            "db_client_connection_use_time",
            "Time that a connection is held.",
            labels=(_POOL,),
            unit="seconds",
        )
        for database, totals in zip(self._databases, self._totals, strict=True):
            labels = (database["name"],)
            timeouts.add_metric(labels, totals.timeouts)
            waited.add_metric(labels, _buckets(totals.waited), totals.waited.total)
            used.add_metric(labels, _buckets(totals.used), totals.used.total)
        yield from (timeouts, waited, used)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*(str(float(each)) for each in BOUNDS), "+Inf"]
    found, so_far = [], 0
    for bound, count in zip(bounds, histogram.counts, strict=True):
        so_far += count
        found.append((bound, float(so_far)))
    return found
