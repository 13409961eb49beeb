"""Reports how each unit of work ended, and what it took."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter, time
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Engine
from typing_extensions import override

from asgi_dbsession.session.lock import End, Reason
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.unit.attempt import RunningAttempt, running_attempt
from asgi_dbsession.unit.observer import UnitObserver
from asgi_dbsession.unit.report import DatabaseReport, Outcome, UnitReport

from .call_site import as_text
from .stats import SessionStats, watch_usage

_logger = logging.getLogger("asgi_dbsession")


@dataclass
class _Record:
    """What is known of one unit of work since its last report."""

    start_time: float = field(default_factory=time)
    start: float = field(default_factory=perf_counter)
    running: RunningAttempt | None = field(default_factory=running_attempt.get)
    stats: dict[Any, SessionStats] = field(default_factory=dict)

    @property
    def has_stats(self) -> bool:
        return any(each.statements or each.wait_time for each in self.stats.values())


class Recorder(UnitObserver):
    """Calls a function with a report at each end of a unit of work.

    Args:
        on_report: The function; what it raises is logged.
    """

    def __init__(self, on_report: Callable[[UnitReport], object]) -> None:
        self._on_report = on_report
        self._records: WeakKeyDictionary[Any, _Record] = WeakKeyDictionary()

    @override
    def engine_used(self, engine: Engine) -> None:
        watch_usage(engine)

    @override
    def unit_began(self, unit: Any) -> None:
        self._records[unit] = _Record()

    @override
    def session_opened(self, unit: Any, database: Any, opened: ManagedSession[Any]) -> None:
        stats = self._records[unit].stats[database] = SessionStats()
        stats.attach(opened)

    @override
    def work_ended(self, unit: Any, end: End) -> None:
        record = self._records[unit]
        if end.had_work or not end.close or record.has_stats:
            self._report(unit, end, record)

    def _report(self, unit: Any, end: End, record: _Record) -> None:
        now = perf_counter()
        reason: Reason | None = None if end.commit else end.reason
        error = end.error
        if end.commit and end.failure is not None:
            reason, error = "commit_failed", end.failure
        report = UnitReport(
            scope=unit.scope,
            outcome=_outcome(end, record),
            reason=reason,
            error=error,
            start_time=record.start_time,
            duration=now - record.start,
            databases=tuple(
                _describe(each, record.stats[each], now)
                for each in unit.databases
                if each in record.stats
            ),
            attempt=record.running.attempt.number if record.running is not None else 1,
            will_retry=_will_retry(unit, end, record),
        )
        record.start_time, record.start = time(), now
        try:
            self._on_report(report)
        except Exception:
            _logger.exception("%r failed; the unit of work ended as reported.", self._on_report)


def _will_retry(unit: Any, end: End, record: _Record) -> bool:
    is_of_request = unit.enclosing is None or unit.joins_outer_unit
    return is_of_request and record.running is not None and record.running.will_retry(end)


def _outcome(end: End, record: _Record) -> Outcome:
    if end.failure is not None or (end.had_work and not end.commit):
        return "rolled_back"
    has_committed = any(each.commits for each in record.stats.values())
    return "committed" if has_committed else "nothing_to_do"


def _describe(database: Any, stats: SessionStats, now: float) -> DatabaseReport:
    stats.stop_waiting(now)  # in vain: the pool was exhausted, or the database is gone
    report = DatabaseReport(
        database=database,
        committed=stats.commits > 0,
        statements=stats.statements,
        operation_duration=stats.operation_duration,
        wait_time=stats.wait_time,
        use_time=stats.use_time,
        idle_time=stats.idle_time,
        idle_after=as_text(stats.idle_after),
        idle_before=as_text(stats.idle_before),
    )
    stats.reset()
    return report
