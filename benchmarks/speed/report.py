"""Writes the document: the tables, and how the figures were measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .goals import goals
from .summary import costs, loses, wins
from .tools import OURS, base, title

_TEMPLATE = Path(__file__).parent / "document.md"
# The lower quartile, the median and the upper quartile, as in the JSON file.
_Values = Sequence[float]


def document(found: dict[str, Any]) -> str:
    """Return the whole document in Markdown."""
    before, after = found["load"]
    return _TEMPLATE.read_text().format(
        command=found["command"],
        date=found["date"],
        machine=found["machine"],
        versions=found["versions"],
        postgresql=found["postgresql"],
        costs=costs(found),
        wins=wins(found),
        loses=loses(found),
        load=f"{before:.1f} before and {after:.1f} after",
        goals=_table(
            ("goal", "measured", "met"),
            [(each.hoped, each.measured, "yes" if each.is_met else "no") for each in goals(found)],
        ),
        in_process=_families(found["in process"]),
        over_uvicorn=_families(found["over uvicorn"]),
        held=_by_tool(found["held"], _held),
        fast=_by_tool(_crowds(found["fast readers"]), lambda each: _spread(each["taken"])),
        slow=_by_tool(_crowds(found["slow readers"]), lambda each: _spread(each["taken"])),
        # The tools that hold no connection serve all of them.
        clients=max(each["heard"] for each in found["listeners"].values()),
        listeners=_listeners(found["listeners"]),
        long_run=_long_run([found["long run"][0], found["long run"][-1]]),
        starts=_by_tool(_turned(found["starts"]), lambda each: f"{_spread(each)} ms"),
        imports=_by_tool(_turned(found["imports"]), lambda each: f"{_spread(each)} ms"),
    )


def _families(families: Mapping[str, Any]) -> str:
    return "\n".join(
        f"### {family}\n\n{_by_tool(figures, _request)}" for family, figures in families.items()
    )


def _request(figures: Mapping[str, _Values]) -> str:
    low, ratio, high = figures["ratio"]
    return f"**{ratio:.2f}** ({low:.2f} to {high:.2f}), {_number(figures['taken'][1])} µs"


def _by_tool(columns: Mapping[str, Mapping[str, Any]], cell: Callable[[Any], str]) -> str:
    tools = next(iter(columns.values()))
    rows = [[_name(tool), *(cell(each[tool]) for each in columns.values())] for tool in tools]
    return _table(["", *columns], rows)


def _name(tool: str) -> str:
    return f"**{title(tool)}**" if base(tool) == OURS else title(tool)


def _crowds(figures: Mapping[str, Any]) -> dict[str, Any]:
    names = {each: f"{int(each):,} clients".replace(",", " ") for each in figures}
    return {names[each] if each != "1" else "1 client": of for each, of in figures.items()}


def _turned(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    columns: dict[str, dict[str, Any]] = {}
    for tool, cells in rows.items():
        for name, value in cells.items():
            columns.setdefault(name, {})[tool] = value
    return columns


def _listeners(found: Mapping[str, Any]) -> str:
    columns = ("", "received the first event", "connections held", "one more SELECT")
    rows = [
        [
            _name(tool),
            str(each["heard"]),
            str(each["connections held"]),
            "no answer" if each["one more SELECT"] is None else f"{each['one more SELECT']:.0f} ms",
        ]
        for tool, each in found.items()
    ]
    return _table(columns, rows)


def _long_run(samples: Sequence[Mapping[str, Any]]) -> str:
    names = list(samples[0])
    rows = [
        [f"{each[name]:.1f} MB" if name == "memory" else str(each[name]) for name in names]
        for each in samples
    ]
    return _table(names, rows)


def _held(values: _Values) -> str:
    low, middle, high = values
    if low == high:  # measured once
        return f"**{middle:,.0f}** ms".replace(",", " ")
    return f"{_spread(values)} ms"


def _spread(values: _Values) -> str:
    low, middle, high = map(_number, values)
    return f"**{middle}** ({low} to {high})"


def _number(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}".replace(",", " ")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
