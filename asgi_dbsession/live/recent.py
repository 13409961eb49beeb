"""Summarizes the ended units of work (requests, for example), for the web page `LivePage`.

The summary tells how long connections were held, which code left a connection idle, and which code
sent the same statement many times.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import quantiles
from typing import Any, TypedDict

from asgi_dbsession.reports.tally import Tally

from .observer import EndedUnit
from .shown import line, name, without_values

# A line of code that sent the same statement this often in one unit of work (a request, for
# example) is reported as a problem (N+1 queries).
_REPEATED = 5
# An idle time of a connection is reported only if it is this long or longer, in seconds.
_IDLE = 0.05
_MOST_SHOWN = 8


class Route(TypedDict):
    """What the units of work of one route did. All times are in seconds.

    `held_p50` and `held_p95` are percentiles: how long a unit of work held its connections.
    """

    route: str
    units: int
    held_p50: float
    held_p95: float
    waited_p95: float
    statements: float
    conflicts: int
    rolled_back: dict[str, int]


class Repeated(TypedDict):
    """A statement that one line of code sent many times in a unit of work (N+1 queries).

    `times` is how often the statement was sent in the unit of work that sent it most often. The
    real number may be higher, because each unit of work stores a limited number of statements.
    """

    route: str
    line: str
    statement: str
    times: int
    units: int


class Idle(TypedDict):
    """Two lines of code, between which a connection was held but not used. Times are in seconds."""

    route: str
    database: str
    after: str
    before: str
    longest: float
    total: float
    units: int


class Recent(TypedDict):
    """The summary of the units of work (requests, for example) that have ended.

    Attributes:
        units: How many units of work there are.
        seconds: How many seconds ago the first of them began.
        routes: What the units of work of each route did. The first route held connections for the
            longest time. To estimate this time, the number of the route's units of work is
            multiplied by the 95th percentile of their times.
        repeated: Statements that one line of code sent many times in one unit of work. The first
            statement was sent most often.
        idle: Lines of code after which a connection was idle. The first line has the greatest sum
            of idle time.
    """

    units: int
    seconds: float
    routes: list[Route]
    repeated: list[Repeated]
    idle: list[Idle]


def summarize(ended: Sequence[EndedUnit], now: float) -> Recent:
    """Return a summary of the ended units of work."""
    return {
        "units": len(ended),
        "seconds": now - min((each.began for each in ended), default=now),
        "routes": _routes(ended),
        "repeated": _repeated(ended),
        "idle": _idle(ended),
    }


def _routes(ended: Iterable[EndedUnit]) -> list[Route]:
    by_route: defaultdict[str, list[EndedUnit]] = defaultdict(list)
    for unit in ended:
        by_route[unit.route].append(unit)
    found = [_route(route, units) for route, units in by_route.items()]
    return sorted(found, key=lambda each: -each["units"] * each["held_p95"])


def _route(route: str, units: list[EndedUnit]) -> Route:
    held = [sum(each.use_time for each in _tallies(unit)) for unit in units]
    waited = [sum(each.wait_time for each in _tallies(unit)) for unit in units]
    reasons = Counter(_reason(unit) for unit in units if unit.outcome == "rolled_back")
    statements = sum(each.statements for unit in units for each in _tallies(unit))
    return {
        "route": route,
        "units": len(units),
        "held_p50": _percentile(held, 50),
        "held_p95": _percentile(held, 95),
        "waited_p95": _percentile(waited, 95),
        "statements": statements / len(units),
        "conflicts": sum(unit.is_conflict for unit in units),
        "rolled_back": dict(reasons.most_common()),
    }


def _tallies(unit: EndedUnit) -> list[Tally]:
    return [tally for _, tally in unit.tallies]


def _reason(unit: EndedUnit) -> str:
    return f"{unit.reason}: {unit.error}" if unit.error else unit.reason


def _percentile(values: list[float], percent: int) -> float:
    # `quantiles` needs at least two values. If there is only one, each percentile is this value.
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def _repeated(ended: Iterable[EndedUnit]) -> list[Repeated]:
    times: Counter[Any] = Counter()
    units: Counter[Any] = Counter()
    for unit in ended:
        sent = Counter(
            (span.call_site, span.statement, database.url.get_backend_name())
            for database, tally in unit.tallies
            for span in tally.spans()
            if span.kind == "statement" and span.call_site is not None
        )
        for key, number in sent.items():
            if number >= _REPEATED:
                times[unit.route, *key] = max(times[unit.route, *key], number)
                units[unit.route, *key] += 1
    return [
        {
            "route": key[0],
            "line": line(key[1]),
            "statement": without_values(key[2], key[3]),
            "times": number,
            "units": units[key],
        }
        for key, number in times.most_common(_MOST_SHOWN)
    ]


def _idle(ended: Iterable[EndedUnit]) -> list[Idle]:
    found: defaultdict[Any, list[float]] = defaultdict(list)
    for unit in ended:
        for database, tally in unit.tallies:
            if tally.idle_time >= _IDLE:
                key = (unit.route, database, tally.idle_after, tally.idle_before)
                found[key].append(tally.idle_time)
    worst = sorted(found.items(), key=lambda each: -sum(each[1]))[:_MOST_SHOWN]
    return [
        {
            "route": route,
            "database": name(database),
            "after": line(after) or "its checkout",
            "before": line(before) or "the end of the unit of work",
            "longest": max(times),
            "total": sum(times),
            "units": len(times),
        }
        for (route, database, after, before), times in worst
    ]
