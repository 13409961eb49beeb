"""Records the open units of work, and the last few hundred ended units."""

from collections import deque
from collections.abc import Iterator
from sys import modules
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from sqlalchemy import Engine
from typing_extensions import override

from asgi_dbsession.reports.recorder import outcome_of, reason_of
from asgi_dbsession.reports.tally import Tally, ended_tally
from asgi_dbsession.reports.watching import watch_usage
from asgi_dbsession.retry.causes import causes
from asgi_dbsession.retry.conflicts import is_conflict
from asgi_dbsession.session.companion import Step
from asgi_dbsession.session.lock import End
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.recording import observed
from asgi_dbsession.unit.observer import UnitObserver
from asgi_dbsession.unit.report import Outcome

from .route import Named, RouteName, name_of, named, route_by_quart
from .totals import Totals

# The largest number of ended units of work that the page remembers.
_MOST_UNITS = 400


class EndedUnit(NamedTuple):
    """A unit of work that has ended, without a reference to its request or to statement values.

    Attributes:
        began: When the unit first asked for a connection; the time is from `perf_counter`.
        ended: When the work of the unit was committed or rolled back.
        error: The class of the exception of the application or of COMMIT; empty if there was none.
        is_conflict: True if the exception is a conflict with another transaction.
        tallies: The statements and times of each database or replica.
    """

    route: str
    began: float
    ended: float
    outcome: Outcome
    reason: str
    error: str
    is_conflict: bool
    tallies: list[tuple[Any, Tally]]


# Why a unit of work failed: True if it was rolled back, the reason, the class of the error, and
# True for a conflict.
_Failure: TypeAlias = tuple[bool, str, str, bool]
_NO_FAILURE: _Failure = (False, "", "", False)

# An ended unit as its request leaves it: the name, the time of the end, the failure, and the steps
# of each database or replica.
_Raw: TypeAlias = tuple[Named, float, _Failure, dict[Any, list[Step]]]


class LiveObserver(UnitObserver):
    """Observes databases for the live page; does nothing for a request without a session.

    A request only stores what happened. The page evaluates this when somebody looks at it, so that
    requests are fast.

    Args:
        databases: The databases to observe.
        route: A function that names a request; None to use the route that the framework declares.
    """

    def __init__(self, databases: tuple[Any, ...], route: RouteName | None) -> None:
        self.totals: dict[Any, Totals] = {each: Totals() for each in databases}
        self._route: RouteName | None = route
        self._ended: deque[_Raw] = deque(maxlen=_MOST_UNITS)
        self._counts: bool = False
        self._by_quart: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        for each in databases:
            each.add_observer(self)

    def open_units(self) -> Iterator[tuple[str, Any]]:
        """Iterate over the units that use a connection or wait for one, each with its name."""
        for unit in tuple(observed):
            if not self.totals.keys().isdisjoint(tuple(unit.sessions)):
                yield name_of(named(unit, self._route, self._by_quart)), unit

    def ended(self) -> list[EndedUnit]:
        """Return the last ended units."""
        found = [_evaluate(each, self._tallies(each)) for each in tuple(self._ended)]
        return [each for each in found if each.tallies]

    def current_totals(self) -> list[Totals]:
        """Return the totals of each database; the first call begins to count."""
        if not self._counts:
            self._counts = True
            for each in tuple(self._ended):
                self._count(each)
        return list(self.totals.values())

    @override
    def engine_used(self, engine: Engine) -> None:
        watch_usage(engine)

    @override
    def session_opened(self, unit: Any, database: Any, opened: ManagedSession[Any]) -> None:
        if opened.companion.steps is None:
            opened.companion.steps = []
        if "quart" in modules:
            self._by_quart[unit] = route_by_quart()

    @override
    def wait_failed(self, unit: Any, database: Any) -> None:
        if database in self.totals:
            self.totals[server_of(database, unit.sessions[database])].timeouts += 1

    @override
    def work_ended(self, unit: Any, end: End, steps: dict[Any, list[Step]]) -> None:
        if steps:
            if unit.is_routed:
                steps = {server_of(each, unit.sessions[each]): steps[each] for each in steps}
            failure = _NO_FAILURE
            if end.failure is not None or end.error is not None or not end.commit:
                failure = _failure_of(end)
            name = named(unit, self._route, self._by_quart)
            self._ended.append((name, perf_counter(), failure, steps))
            if self._counts:
                self._count(self._ended[-1])

    def _tallies(self, raw: _Raw) -> list[tuple[Any, Tally]]:
        _, now, _, steps = raw
        return [(each, ended_tally(steps[each], now)) for each in steps if each in self.totals]

    def _count(self, raw: _Raw) -> None:
        for database, tally in self._tallies(raw):
            self.totals[database].add(tally)


def server_of(database: Any, opened: ManagedSession[Any]) -> Any:
    """Return the replica that the session uses, or the database itself."""
    engine: Any = opened.orm.bind
    for each in database.replicas:
        if each.is_running and engine is not None and each.engine.pool is engine.pool:
            return each
    return database


def _evaluate(raw: _Raw, tallies: list[tuple[Any, Tally]]) -> EndedUnit:
    name, now, (is_rolled_back, reason, error, has_conflict), _ = raw
    is_committed = any(tally.commits for _, tally in tallies)
    outcome: Outcome = "committed" if is_committed else "nothing_to_do"
    if is_rolled_back:
        outcome = "rolled_back"
    began = min((tally.began for _, tally in tallies), default=now)
    return EndedUnit(name_of(name), began, now, outcome, reason, error, has_conflict, tallies)


def _failure_of(end: End) -> _Failure:
    error = end.failure or end.error
    is_rolled_back = outcome_of(end, 0) == "rolled_back"
    reason = (reason_of(end) or "") if is_rolled_back else ""
    name = "" if error is None else type(error).__name__
    return is_rolled_back, reason, name, _has_conflict(error)


def _has_conflict(error: BaseException | None) -> bool:
    return any(is_conflict(getattr(each, "orig", each)) for each in causes(error))
