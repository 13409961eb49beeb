"""Writes what was tested with what, as tables: `pytest --matrix docs/tested.md`.

`@pytest.mark.matrix("Frameworks", "framework")` gives the table "Frameworks" a row, which is the
first line of the test's docstring, with a cell for each value of its parameter `framework`.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TITLE = """# What is tested with what

Each cell is what a run of the test suite found (`pytest --matrix docs/tested.md`); none is written
by hand.
"""
_MARKS = {"failed": "✗", "passed": "✓"}  # the worst first


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="FILE", help="write the tables of what was tested to FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "matrix(table, parameter): a row of a table in the docs")
    if config.option.matrix:
        config.pluginmanager.register(Matrix(Path(config.option.matrix)), "matrix-writer")


class Matrix:
    """Collects the outcome of every marked test."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._place: dict[str, tuple[str, str, str]] = {}
        self._tables: dict[str, dict[str, dict[str, set[str]]]] = defaultdict(dict)
        self._columns: dict[str, dict[str, None]] = defaultdict(dict)

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # before anyone puts them in random order
    def pytest_collection_modifyitems(self, items: list[Any]) -> Iterator[None]:
        for item in items:
            mark = item.get_closest_marker("matrix")
            if mark is None:
                continue
            table, parameter = mark.args
            column = str(item.callspec.params[parameter])
            row = (item.function.__doc__ or item.function.__name__).splitlines()[0].rstrip(".")
            self._place[item.nodeid] = table, row, column
            self._tables[table].setdefault(row, defaultdict(set))
            self._columns[table][column] = None
        yield

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        place = self._place.get(report.nodeid)
        if place is None or (report.when != "call" and report.outcome == "passed"):
            return
        table, row, column = place
        mark: str = report.outcome
        if isinstance(report.longrepr, tuple) and report.skipped:
            mark += report.longrepr[2].removeprefix("Skipped")
        self._tables[table][row][column].add(mark)

    def pytest_sessionfinish(self) -> None:
        parts = [TITLE, *(self._table(title) for title in sorted(self._tables))]
        self._file.write_text("\n".join(parts))

    def _table(self, title: str) -> str:
        columns = list(self._columns[title])
        # By their text, not by when they came: the order of the tests is random.
        outcomes = {
            each
            for cells in self._tables[title].values()
            for cell in cells.values()
            for each in cell
        }
        notes = sorted(
            each.removeprefix("skipped: ") for each in outcomes if each.startswith("skipped: ")
        )
        lines = [f"## {title}", "", _line(["", *columns]), _line(["---", *[":-:"] * len(columns)])]
        for row, cells in self._tables[title].items():
            lines.append(_line([row, *(_cell(cells[column], notes) for column in columns)]))
        lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(notes, 1))]
        return "\n".join(lines).rstrip() + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(outcomes: set[str], notes: list[str]) -> str:
    for outcome, mark in _MARKS.items():
        if outcome in outcomes:
            return mark
    reasons = sorted(notes.index(each.removeprefix("skipped: ")) + 1 for each in outcomes)
    return f"- {reasons}" if reasons else "?"
