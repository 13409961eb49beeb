"""Records which units of work are open, and stores the last ended units of work."""

from collections import deque
from collections.abc import Iterator
from functools import partial
from sys import modules
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from sqlalchemy import Engine
from typing_extensions import override

from asgi_dbsession.reports.recorder import outcome_of, reason_of
from asgi_dbsession.reports.recording import record
from asgi_dbsession.reports.tally import Tally
from asgi_dbsession.reports.watching import watch_usage
from asgi_dbsession.retry.causes import causes
from asgi_dbsession.retry.conflicts import is_conflict
from asgi_dbsession.retry.overload import on_pool_timeout
from asgi_dbsession.session.companion import Step
from asgi_dbsession.session.end import End
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.unit.observer import UnitObserver
from asgi_dbsession.unit.report import Outcome

from .route import Named, RouteName, name_of, named, route_by_quart
from .totals import Totals

# At most this many ended units of work are stored.
_MOST_UNITS = 400


class EndedUnit(NamedTuple):
    """A record of a unit of work (a request or a `begin()` block) that has ended.

    Attributes:
        began: When the unit of work first asked for a connection, as a time of Python's
            `perf_counter`.
        ended: When the work was committed or rolled back.
        error: The name of the exception's class, for an exception of the application or of COMMIT.
            Empty if there was none.
        is_conflict: True if the exception is a conflict with another transaction.
        tallies: What the unit of work did with each database or replica: statements and time.
    """

    route: str
    began: float
    ended: float
    outcome: Outcome
    reason: str
    error: str
    is_conflict: bool
    tallies: list[tuple[Any, Tally]]


# How a unit of work has ended: (1) the outcome, (2) the reason of a rollback, (3) the name of the
# error's class, (4) True if the error is a conflict with another transaction.
_Result: TypeAlias = tuple[Outcome, str, str, bool]
_SUCCESS: _Result = ("committed", "", "", False)


class LiveObserver(UnitObserver):
    """Records units of work for the web page `LivePage`. Requests without a session cost nothing.

    During a request, this object only stores what happened. Percentiles and other results are
    calculated when somebody looks at the page.

    Args:
        databases: The databases to record.
        route: A function that returns a name for a request. None to use the route that is declared
            in the framework.
    """

    def __init__(self, databases: tuple[Any, ...], route: RouteName | None) -> None:
        self.totals: dict[Any, Totals] = {each: Totals() for each in databases}
        self._route: RouteName | None = route
        # For each ended unit of work: its name, when it ended, its result, and its steps
        # (statements, for example) by database or replica.
        self._ended: deque[tuple[Named, float, _Result, dict[Any, list[Step]]]] = deque(
            maxlen=_MOST_UNITS
        )
        # The units of work that have opened a session and have not ended. After an exception of a
        # signal handler, units of work that have ended may stay here until `open_units` is called.
        self._open: set[Any] = set()
        self._counts: bool = False
        self._by_quart: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        for each in databases:
            each.add_observer(self)

    def open_units(self) -> Iterator[tuple[str, Any]]:
        """Yield each open unit of work that has a session of one of the databases.

        Each value is a pair: a name to show (such as `GET /orders`), and the unit of work.
        """
        for unit in tuple(self._open):
            if unit.closed and not unit.sessions:
                self._open.discard(unit)
            elif not self.totals.keys().isdisjoint(tuple(unit.sessions)):
                yield name_of(named(unit, self._route, self._by_quart)), unit

    def ended(self) -> list[EndedUnit]:
        """Return the latest ended units of work (at most `_MOST_UNITS`), the oldest first.

        Leave out units of work that used none of the databases that the web page shows.
        """
        found = [
            _evaluate(name, now, result, self._tallies(steps, now))
            for name, now, result, steps in tuple(self._ended)
        ]
        return [each for each in found if each.tallies]

    def current_totals(self) -> list[Totals]:
        """Return a `Totals` object (how long units of work waited, for example) of each database.

        To save time, nothing is added up before the first call. The first call adds up the ended
        units of work that are stored. After that, each unit of work is added when it ends.
        """
        if not self._counts:
            self._counts = True
            for _, now, _, steps in tuple(self._ended):
                self._count(steps, now)
        return list(self.totals.values())

    @override
    def engine_used(self, engine: Engine) -> None:
        watch_usage(engine)

    @override
    def session_opened(self, unit: Any, database: Any, opened: ManagedSession[Any]) -> None:
        self._open.add(unit)
        record(opened.companion)
        on_pool_timeout(opened.companion, partial(self._count_timeout, database, opened))
        if "quart" in modules:
            self._by_quart[unit] = route_by_quart()

    @override
    def work_ended(self, unit: Any, end: End, steps: dict[Any, list[Step]]) -> None:
        if end.close:
            self._open.discard(unit)
        if steps:
            if unit.is_routed:
                steps = {server_of(each, unit.sessions[each]): steps[each] for each in steps}
            result, now = _SUCCESS, perf_counter()
            if end.failure is not None or end.error is not None or not end.commit:
                result = _result_of(end)
            self._ended.append((named(unit, self._route, self._by_quart), now, result, steps))
            if self._counts:
                self._count(steps, now)

    def _count_timeout(self, database: Any, opened: ManagedSession[Any]) -> None:
        if database in self.totals:
            self.totals[server_of(database, opened)].timeouts += 1

    def _tallies(self, steps: dict[Any, list[Step]], now: float) -> list[tuple[Any, Tally]]:
        shown = [each for each in steps if each in self.totals]
        return [(each, Tally(steps[each], now, has_ended=True)) for each in shown]

    def _count(self, steps: dict[Any, list[Step]], now: float) -> None:
        for database, tally in self._tallies(steps, now):
            self.totals[database].add(tally)


def server_of(database: Any, opened: ManagedSession[Any]) -> Any:
    """Return the replica that the session uses. If it uses the primary, return `database`."""
    engine: Any = opened.orm.bind
    for each in database.replicas:
        if each.is_running and engine is not None and each.engine.pool is engine.pool:
            return each
    return database


def _evaluate(
    name: Named, now: float, result: _Result, tallies: list[tuple[Any, Tally]]
) -> EndedUnit:
    outcome, reason, error, has_conflict = result
    if outcome == "committed" and not any(tally.commits for _, tally in tallies):
        outcome = "nothing_to_do"
    began = min((tally.began for _, tally in tallies), default=now)
    return EndedUnit(name_of(name), began, now, outcome, reason, error, has_conflict, tallies)


def _result_of(end: End) -> _Result:
    error, outcome = end.failure or end.error, outcome_of(end, 1)
    reason = (reason_of(end) or "") if outcome == "rolled_back" else ""
    name = "" if error is None else type(error).__name__
    has_conflict = any(is_conflict(getattr(each, "orig", each)) for each in causes(error))
    return outcome, reason, name, has_conflict
