"""The page: tables, and how their figures came to be."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.report import table

from .lag import Reads, Routing
from .model import Way
from .overload import HEAVY, LIGHT, LISTENERS, SECONDS, START, STOP, USUAL, Limit, Storm
from .scale import FAST, LISTENERS as LISTENING, RATE, READERS, WORKERS, Need, kinds
from .storm import CAPACITY, PATIENCE
from .validate import Cell

_WAYS = {
    Way.UNTIL_READ: "*until the client has read* the response,",
    Way.UNTIL_COMMIT: "*until COMMIT*, before the response is sent, or",
    Way.STATEMENTS: "*until COMMIT, reads without transaction*: this package.",
}
_TEMPLATE = Path(__file__).parent / "document.md"


class Lag(NamedTuple):
    """Reads with one kind of routing, at one lag, of clients with one gap between requests."""

    routing: Routing
    lag: float
    gap: float
    reads: Reads


class Figures(NamedTuple):
    """All that the page shows."""

    command: str
    seed: int
    speed: Mapping[str, Any]
    measured: Mapping[str, Any]
    cells: Sequence[Cell]
    needs: Sequence[Need]
    lags: Sequence[Lag]
    limits: Sequence[Limit]
    stops: Sequence[Storm]
    reconnections: Sequence[Storm]


def document(found: Figures) -> str:
    """All of it, in Markdown."""
    read, *_ = kinds(found.speed, FAST)
    return _TEMPLATE.read_text().format(
        in_short=_in_short(found.needs),
        ways="".join(f"- {words}\n" for words in _WAYS.values()),
        needs=_needs(found.needs),
        lags=_lags(found.lags),
        capacity=f"{CAPACITY:.0f}",
        patience=f"{PATIENCE:.0f}",
        light=f"{LIGHT:.0%}".replace("%", " %"),
        heavy=f"{HEAVY:.0%}".replace("%", " %"),
        usual=f"{USUAL:.0%}".replace("%", " %"),
        limits=_limits(found.limits),
        stop=f"{STOP:.0f}",
        stops=_storms(found.stops),
        listeners=_number(LISTENERS),
        after=SECONDS - START - int(STOP),
        reconnections=_storms(found.reconnections),
        date_speed=found.speed["date"],
        times=(
            f"{(read.handle + read.send) * 1e3:.2f} ms for a request without the database (over "
            f"uvicorn), and {(read.loop + read.work) * 1e3:.2f} ms for each statement, BEGIN or "
            "COMMIT"
        ),
        seed=found.seed,
        command=found.command,
        date=found.measured["date"],
        machine=found.measured["machine"],
        good=sum(cell.is_good for cell in found.cells),
        all=len(found.cells),
        misses=_misses(found.cells),
        cells=_cells(found.cells),
    )


def _in_short(needs: Sequence[Need]) -> str:
    """Return the answer for the largest case."""
    by_way = {each.way: each for each in needs if each.readers == LISTENING}
    ours, commit, read = (by_way[way] for way in reversed(Way))
    return (
        f"For example, {_number(RATE)} requests per second, from many workers through PgBouncer, "
        f"need {_number(ours.on_server)}\nconnections with this package (the rule says "
        f"{_number(ours.rule)}). They need "
        f"{_number(commit.on_server)} if reads run in a transaction,\nand "
        f"{_number(read.on_server)} if connections are held until clients have read the response."
    )


def _needs(needs: Sequence[Need]) -> str:
    columns = (
        "held",
        "busy",
        "enough for each worker",
        "all workers",
        "PgBouncer",
        "rule",
        "waits",
    )
    tables = []
    for readers in READERS:
        rows = [
            [
                each.way.value,
                _number(each.mean),
                str(each.in_pool),
                _number(each.in_pool * WORKERS),
                _number(each.on_server),
                _number(each.rule),
                f"{each.waited * 1e3:.1f} ms",
            ]
            for each in needs
            if each.readers == readers
        ]
        tables.append(f"### {readers[0].upper()}{readers[1:]}\n\n{table(columns, rows)}")
    return "\n".join(tables)


def _lags(lags: Sequence[Lag]) -> str:
    columns = (
        "a client asks every",
        "lag",
        "routing",
        "reads on the primary",
        "stale",
        "back in time",
    )
    rows = [
        [
            f"{each.gap:g} s",
            f"{each.lag:g} s",
            each.routing.value,
            _share(each.reads.on_primary / each.reads.count),
            _share(each.reads.stale / each.reads.count),
            _share(each.reads.back / each.reads.count),
        ]
        for each in lags
    ]
    return table(columns, rows)


def _limits(limits: Sequence[Limit]) -> str:
    columns = (
        "`pool_timeout`",
        "refused",
        "answers in time",
        "95 % of them within",
        "answers to nobody",
    )
    rows = [
        [
            f"{each.timeout:g} s",
            _share(each.refused),
            f"{each.useful:.0f} /s",
            f"{each.taken:.2f} s",
            f"{each.late:.0f} /s",
        ]
        for each in limits
    ]
    return table(columns, rows)


def _storms(storms: Sequence[Storm]) -> str:
    columns = ("clients try again", "`pool_timeout`", "worst second", "no answer", "recovered")
    rows = [
        [
            each.retry,
            f"{each.timeout:g} s",
            f"{each.most:.1f} ×",
            _share(each.unanswered),
            "no" if each.recovered is None else f"{each.recovered} s",
        ]
        for each in storms
    ]
    return table(columns, rows)


def _cells(cells: Sequence[Cell]) -> str:
    crowds = sorted({cell.clients for cell in cells})
    by_row: dict[tuple[str, int], dict[int, str]] = {}
    for cell in cells:
        difference = f"{cell.error:+.0%}".replace("%", " %")
        words = difference if cell.is_good else f"**{difference}**"
        row = by_row.setdefault((cell.request, cell.pool), {})
        row[cell.clients] = f"{_rate(cell.measured)} /s, {words}"
    columns = ("request", "pool", *(f"{_number(each)} client{'s' * (each > 1)}" for each in crowds))
    rows = [
        [request, str(pool), *(row.get(each, "–") for each in crowds)]
        for (request, pool), row in by_row.items()
    ]
    return table(columns, rows)


def _misses(cells: Sequence[Cell]) -> str:
    bad = sorted({cell.request for cell in cells if not cell.is_good})
    return f" It misses in *{', '.join(bad)}*, set in bold." if bad else ""


def _rate(value: float) -> str:
    return _number(value) if value >= 100 else f"{value:.1f}"


def _share(value: float) -> str:
    return f"{value:.1%}".replace("%", " %") if value else "0"


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")
