"""A unit of work that reports how it ended."""

import logging
import sys
from collections.abc import Callable
from time import perf_counter, time
from typing import Any, TypeVar

from typing_extensions import override

from asgi_dbsession.database.base import Database
from asgi_dbsession.types import Scope
from asgi_dbsession.unit.managed_session import OpenSession, SessionSource
from asgi_dbsession.unit.unit_of_work import UnitOfWork

from .call_site import as_text
from .report import DatabaseReport, Outcome, Reason, UnitReport
from .stats import Usage, forget

S = TypeVar("S")

_logger = logging.getLogger("asgi_dbsession")

# What an application raises; whatever else comes unwinds it.
_RAISED = (Exception, BaseExceptionGroup, KeyboardInterrupt, SystemExit)


class ReportedUnit(UnitOfWork):
    """What `UnitOfWork` is, and a call for each end.

    Args:
        on_report: Called with each report; what it raises is logged.
        databases: As for the class itself.
        scope: As for the class itself.
        enclosing: As for the class itself.
    """

    def __init__(
        self,
        on_report: Callable[[UnitReport], object],
        databases: tuple[SessionSource[Any], ...],
        scope: Scope | None,
        enclosing: UnitOfWork | None,
    ) -> None:
        super().__init__(databases, scope, enclosing)
        self._on_report = on_report
        self._usages: dict[Database[Any, Any], Usage] = {}
        self._reports = 0
        self._reason: Reason | None = None
        self._error: BaseException | None = None
        # One that is being handled around this unit says nothing of what happens in it.
        self._handled = sys.exception()
        self._start_time, self._start = time(), perf_counter()

    @override
    def within(self, databases: tuple[SessionSource[Any], ...]) -> UnitOfWork:
        return ReportedUnit(self._on_report, databases, self.scope, self)

    @override
    def open(self, database: SessionSource[S]) -> S:
        session = super().open(database)
        if database not in self._usages and isinstance(database, Database):
            usage = Usage()
            if self._usages.setdefault(database, usage) is usage:
                usage.follow(self.sessions[database].orm)
        return session

    @override
    async def end(self, *, commit: bool, only_of: tuple[object, ...] | None = None) -> None:
        reports = self._reports
        self._reason = None if commit else "set_rollback" if self.rollback else "status"
        self._error = None
        await super().end(commit=commit, only_of=only_of)
        if only_of is None and reports == self._reports:
            self._report_rest()

    @override
    async def close(self, *, commit: bool) -> None:
        self._give_reason(commit=commit)
        sessions = [each.orm for each in self.sessions.values()]
        try:
            await super().close(commit=commit)
            if any(each.statements or each.wait_time for each in self._usages.values()):
                self._report_rest()
        finally:
            for session in sessions:
                forget(session)

    @override
    async def _end_each(
        self, working: list[OpenSession[Any]], *, commit: bool, close: bool
    ) -> None:
        try:
            await super()._end_each(working, commit=commit, close=close)
        except Exception as error:
            self._report_end(commit=commit, is_work=True, failure=error)
            raise
        else:
            self._report_end(commit=commit, is_work=bool(working))

    def _give_reason(self, *, commit: bool) -> None:
        error = sys.exception()
        self._reason, self._error = None, None if error is self._handled else error
        if commit:
            return
        if self._error is None:
            self._reason = "set_rollback" if self.rollback else "unfinished"
        else:
            self._reason = "exception" if isinstance(self._error, _RAISED) else "cancelled"

    def _report_end(self, *, commit: bool, is_work: bool, failure: Exception | None = None) -> None:
        if failure is not None and commit:
            self._reason, self._error = "commit_failed", failure
        if failure is not None or (is_work and not commit):
            self._report("rolled_back")
        else:
            self._report_rest()

    def _report_rest(self) -> None:
        stored = any(each.commits for each in self._usages.values())
        self._report("committed" if stored else "nothing_to_do")

    def _report(self, outcome: Outcome) -> None:
        now = perf_counter()
        report = UnitReport(
            scope=self.scope,
            outcome=outcome,
            reason=self._reason,
            error=self._error,
            start_time=self._start_time,
            duration=now - self._start,
            databases=tuple(
                _describe(each, self._usages[each], now)
                for each in self.databases
                if isinstance(each, Database) and each in self._usages
            ),
        )
        self._reports += 1
        self._start_time, self._start = time(), now
        try:
            self._on_report(report)
        except Exception:
            _logger.exception("%r failed; the unit of work is over as reported.", self._on_report)


def _describe(database: Database[Any, Any], usage: Usage, now: float) -> DatabaseReport:
    usage.stop_waiting(now)  # in vain: the pool was exhausted, or the database is gone
    report = DatabaseReport(
        database=database,
        committed=usage.commits > 0,
        statements=usage.statements,
        operation_duration=usage.operation_duration,
        wait_time=usage.wait_time,
        use_time=usage.use_time,
        idle_time=usage.idle_time,
        idle_after=as_text(usage.idle_after),
        idle_before=as_text(usage.idle_before),
    )
    usage.reset()
    return report
