"""Writes the document: the tables, and how to repeat the measurement."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .check import CASES
from .failover import Failover
from .run import Result
from .tools import TOOLS, versions

_TEMPLATE = Path(__file__).parent / "document.md"
_APPENDIX = Path(__file__).parent / "details.md"
_COLUMNS = (
    "fault",
    "faults",
    "requests",
    "acknowledged",
    "refused",
    "open",
    "lost",
    "twice",
    "phantom",
    "half",
    "money",
    "held",
    "open on the server",
    "recovered after",
)
_MOSTLY_ZERO = {"twice", "half", "money"}


def document(
    command: str,
    results: Mapping[str, Sequence[Result]],
    checks: Mapping[str, Mapping[str, str]],
    failovers: Mapping[tuple[str, str], Failover],
    **sections: str,
) -> str:
    """Return the whole document in Markdown; sections of other runs are arguments."""
    ledgers = [result.ledger for of_tool in results.values() for result in of_tool]
    return _TEMPLATE.read_text().format(
        command=command,
        versions=f"Python {platform.python_version()}, {versions()}",
        faults=sum(result.faults for of_tool in results.values() for result in of_tool),
        acknowledged=sum(len(ledger.acknowledged) for ledger in ledgers),
        requests=sum(ledger.requests for ledger in ledgers),
        side_by_side=side_by_side(results),
        checked=_checked(checks),
        failed_over=_failed_over(failovers),
        **sections,
    )


def appendix(command: str, results: Mapping[str, Sequence[Result]]) -> str:
    """Return the page with all counts of every tool, in Markdown."""
    details = [f"## {TOOLS[tool]}\n\n{in_detail(found)}" for tool, found in results.items()]
    return _APPENDIX.read_text().format(command=command, details="\n".join(details).rstrip())


def in_detail(results: Sequence[Result]) -> str:
    """Return all counts of one tool."""
    columns = zip(_COLUMNS, *map(_row, results), strict=True)
    shown = [each for each in columns if each[0] not in _MOSTLY_ZERO or set(each[1:]) != {"0"}]
    heads, *rows = zip(*shown, strict=True)
    return table(heads, rows)


def side_by_side(results: Mapping[str, Sequence[Result]]) -> str:
    """Return the errors of every tool."""
    by_fault: dict[str, dict[str, str]] = {}
    for tool, found in results.items():
        for result in found:
            by_fault.setdefault(result.fault, {})[tool] = ", ".join(result.complaints) or "✓"
    rows = [[fault, *(cells[tool] for tool in results)] for fault, cells in by_fault.items()]
    return table(["", *(TOOLS[tool] for tool in results)], rows)


def _checked(checks: Mapping[str, Mapping[str, str]]) -> str:
    rows = [[case, *(words[case] or "✓" for words in checks.values())] for case in CASES]
    return table(["", *(TOOLS[tool] for tool in checks)], rows)


def _failed_over(failovers: Mapping[tuple[str, str], Failover]) -> str:
    columns = (
        "",
        "driver",
        "acknowledged before",
        "after",
        "open",
        "lost",
        "promoted after",
        "first success after",
    )
    rows = [
        [
            TOOLS[tool],
            driver,
            str(each.before),
            str(len(each.ledger.acknowledged) - each.before),
            f"{len(each.ledger.open)} ({each.finding.open_stored})",
            str(each.finding.lost),
            f"{each.promotion:.2f} s",
            "never" if each.gap is None else f"{each.gap:.2f} s",
        ]
        for (tool, driver), each in failovers.items()
    ]
    return table(columns, rows)


def _row(result: Result) -> list[str]:
    ledger, finding = result.ledger, result.finding
    counts = (finding.lost, finding.twice, finding.phantom, finding.half, finding.money)
    return [
        result.fault,
        str(result.faults),
        str(ledger.requests),
        str(len(ledger.acknowledged)),
        str(len(ledger.refused)),
        f"{len(ledger.open)} ({finding.open_stored})",
        *map(str, counts),
        str(result.held),
        str(result.open),
        "never" if result.recovered is None else f"{result.recovered:.2f} s",
    ]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
