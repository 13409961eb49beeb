"""Calls a function with a report after each unit of work."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter, time
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Engine
from typing_extensions import override

from asgi_dbsession.errors import name_of
from asgi_dbsession.session.companion import Step
from asgi_dbsession.session.end import End, Reason
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.unit.attempt import RunningAttempt, running_attempt
from asgi_dbsession.unit.observer import UnitObserver
from asgi_dbsession.unit.report import DatabaseReport, Outcome, UnitReport

from .call_site import as_text
from .recording import record
from .tally import Tally
from .watching import unwatch_usage, watch_usage

_logger = logging.getLogger("asgi_dbsession")


@dataclass
class _Start:
    """When a unit of work began, and which attempt to serve the request was running then."""

    start_time: float = field(default_factory=time)
    counter: float = field(default_factory=perf_counter)
    running: RunningAttempt = field(default_factory=running_attempt.get)


class Recorder(UnitObserver):
    """Calls the function `on_report` with a report after each commit or rollback.

    Args:
        on_report: The function to call. If it raises an exception, the exception is logged.
    """

    def __init__(self, on_report: Callable[[UnitReport], object]) -> None:
        self._on_report = on_report
        self._starts: WeakKeyDictionary[Any, _Start] = WeakKeyDictionary()

    @override
    def engine_used(self, engine: Engine) -> None:
        watch_usage(engine)

    @override
    def engine_left(self, engine: Engine) -> None:
        unwatch_usage(engine)

    @override
    def unit_began(self, unit: Any) -> None:
        self._starts[unit] = _Start()

    @override
    def session_opened(self, unit: Any, database: Any, opened: ManagedSession[Any]) -> None:
        record(opened.companion)

    @override
    def work_ended(self, unit: Any, end: End, steps: dict[Any, list[Step]]) -> None:
        now = perf_counter()
        tallies = {each: Tally(steps.get(each, []), now, has_ended=True) for each in unit.sessions}
        has_tallies = any(each.statements or each.wait_time for each in tallies.values())
        if end.had_work or not end.close or has_tallies:
            self._report(unit, end, self._starts[unit], tallies, now)

    def _report(
        self, unit: Any, end: End, start: _Start, tallies: dict[Any, Tally], now: float
    ) -> None:
        reason = reason_of(end)
        report = UnitReport(
            scope=unit.scope,
            outcome=outcome_of(end, sum(each.commits for each in tallies.values())),
            reason=reason,
            error=end.failure if reason == "commit_failed" else end.error,
            start_time=start.start_time,
            duration=now - start.counter,
            databases=tuple(
                _describe(each, tallies[each]) for each in unit.databases if each in tallies
            ),
            attempt=start.running.attempt.number,
            will_retry=_will_retry(unit, end, start.running),
            read_only=unit.read_only,
        )
        start.start_time, start.counter = time(), now
        try:
            self._on_report(report)
        except Exception:
            name = name_of(self._on_report)
            _logger.exception(
                "The on_report function %s failed. The unit of work is not affected.", name
            )


def _will_retry(unit: Any, end: End, running: RunningAttempt) -> bool:
    is_of_request = unit.enclosing is None or unit.joins_outer_unit
    return is_of_request and running.will_retry(end)


def outcome_of(end: End, commits: int) -> Outcome:
    """Return what happened to the work: `committed`, `rolled_back`, or `nothing_to_do`."""
    if end.failure is not None or (end.had_work and not end.commit):
        return "rolled_back"
    return "committed" if commits else "nothing_to_do"


def reason_of(end: End) -> Reason | None:
    """Return why the work was not committed, or None if it was committed."""
    if not end.commit:
        return end.reason
    return None if end.failure is None else "commit_failed"


def _describe(database: Any, tally: Tally) -> DatabaseReport:
    return DatabaseReport(
        database=database,
        committed=tally.commits > 0,
        statements=tally.statements,
        operation_duration=tally.operation_duration,
        wait_time=tally.wait_time,
        use_time=tally.use_time,
        idle_time=tally.idle_time,
        idle_after=as_text(tally.idle_after),
        idle_before=as_text(tally.idle_before),
    )
