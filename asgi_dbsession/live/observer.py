"""Records the open units of work, and the last few hundred ended units."""

from collections import deque
from collections.abc import Iterator
from time import perf_counter
from typing import Any, NamedTuple

from sqlalchemy import Engine
from typing_extensions import override

from asgi_dbsession.reports.recorder import outcome_of, reason_of
from asgi_dbsession.reports.stats import SessionStats, stats_of
from asgi_dbsession.reports.tally import Tally
from asgi_dbsession.reports.watching import watch_usage
from asgi_dbsession.retry.causes import causes
from asgi_dbsession.retry.conflicts import is_conflict
from asgi_dbsession.session.lock import End
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.unit.observer import UnitObserver
from asgi_dbsession.unit.report import Outcome

from .route import RouteName, name_of, route_by_quart
from .totals import Totals

# The largest number of ended units of work that the page remembers.
_MOST_UNITS = 400


class OpenUnit:
    """A unit of work that has a session and has not ended.

    Attributes:
        began: When the unit opened its first session, or when its previous work ended; the time is
            from `perf_counter`.
        read_only: True if the unit may only read.
    """

    __slots__ = ("began", "read_only", "route_by_quart", "sessions")

    def __init__(self, read_only: bool) -> None:
        self.began: float = perf_counter()
        self.read_only: bool = read_only
        self.route_by_quart: str = route_by_quart()
        self.sessions: tuple[tuple[Any, SessionStats], ...] = ()

    def used(self) -> list[tuple[Any, SessionStats]]:
        """Return the statistics of each session, with the database or replica that it uses."""
        return [(_server_of(database, stats), stats) for database, stats in self.sessions]


class EndedUnit(NamedTuple):
    """A unit of work that has ended, without a reference to its request or to statement values.

    Attributes:
        began: When the unit opened its first session; the time is from `perf_counter`.
        ended: When the work of the unit was committed or rolled back.
        error: The class of the exception of the application or of COMMIT; empty if there was none.
        is_conflict: True if the exception is a conflict with another transaction.
        tallies: The statements and times of each database.
    """

    route: str
    began: float
    ended: float
    outcome: Outcome
    reason: str
    error: str
    is_conflict: bool
    tallies: list[tuple[Any, Tally]]


class LiveObserver(UnitObserver):
    """Observes databases for the live page; does nothing for a request without a session.

    Args:
        databases: The databases to observe.
        route: A function that names a request; None to use the route that the framework declares.
    """

    def __init__(self, databases: tuple[Any, ...], route: RouteName | None) -> None:
        self.ended: deque[EndedUnit] = deque(maxlen=_MOST_UNITS)
        self.totals: dict[Any, Totals] = {each: Totals() for each in databases}
        self._route: RouteName | None = route
        self._open: dict[Any, OpenUnit] = {}
        for each in databases:
            each.add_observer(self)

    def open_units(self) -> Iterator[tuple[str, OpenUnit]]:
        """Iterate over the open units, each with the name of its request."""
        # Copy the units: another thread may open a unit, which changes the dictionary.
        for unit, found in tuple(self._open.items()):
            yield name_of(unit, self._route, found.route_by_quart), found

    @override
    def engine_used(self, engine: Engine) -> None:
        watch_usage(engine)

    @override
    def session_opened(self, unit: Any, database: Any, opened: ManagedSession[Any]) -> None:
        # A unit of work may also use databases that the page does not show. Ignore these databases.
        if database in self.totals:
            stats = stats_of(opened)
            stats.keeps_spans = True
            found = self._open.get(unit)
            if found is None:
                found = self._open[unit] = OpenUnit(unit.read_only)
            found.sessions = (*found.sessions, (database, stats))

    @override
    def wait_failed(self, unit: Any, error: Exception) -> None:
        now, found = perf_counter(), self._open.get(unit)
        for database, stats in found.used() if found is not None else ():
            if stats.asked is not None and stats.checkout is None:
                stats.stop_waiting(now)
                self.totals[database].timeouts += 1

    @override
    def work_ended(self, unit: Any, end: End) -> None:
        found = self._open.pop(unit, None) if end.close else self._open.get(unit)
        if found is None:
            return
        now, began = perf_counter(), found.began
        found.began = now
        # Most units end twice: before the response, and after the response without any new work.
        # Record only ends at which something was measured.
        for _, stats in found.sessions:
            if stats.has_measured(end):
                break
        else:
            return
        tallies = [(database, stats.settle(end, now)) for database, stats in found.used()]
        for database, tally in tallies:
            self.totals[database].add(tally)
        route = name_of(unit, self._route, found.route_by_quart)
        self.ended.append(_ended(route, began, now, end, tallies))


def _server_of(database: Any, stats: SessionStats) -> Any:
    for each in database.replicas:
        if each.is_running and each.engine.pool is stats.pool:
            return each
    return database


def _ended(
    route: str, began: float, now: float, end: End, tallies: list[tuple[Any, Tally]]
) -> EndedUnit:
    error = end.failure or end.error
    outcome = outcome_of(end, sum(tally.commits for _, tally in tallies))
    if error is None and outcome != "rolled_back":
        return EndedUnit(route, began, now, outcome, "", "", False, tallies)
    reason = (reason_of(end) or "") if outcome == "rolled_back" else ""
    name = "" if error is None else type(error).__name__
    return EndedUnit(route, began, now, outcome, reason, name, _has_conflict(error), tallies)


def _has_conflict(error: BaseException | None) -> bool:
    return any(is_conflict(getattr(each, "orig", each)) for each in causes(error))
