"""Writes what was tested with what, as tables: `pytest --matrix docs/tested.md`.

`@pytest.mark.matrix("Frameworks", "framework")` gives the table "Frameworks" a row, which is the
first line of the test's docstring, with a cell for each value of its parameter `framework`. Tests
may run in several processes (`-n 2`): a report carries the place of its test.

`python tests/matrix.py docs/tested.md` writes only the versions, after a change of the lock.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

TITLE = """---
description: Drivers, frameworks, servers and versions with which asgi_dbsession is tested.
---

# Tested versions, drivers, frameworks and servers

The test suite makes this page (`pytest --matrix docs/tested.md`). Each cell of the tables after
*Versions* is the result of a run. The last table is about [`rolled_back`](how-to/testing.md).

## Versions

The hosted build installs these versions (`requirements/`). It runs all tests with Python 3.11, the
main tests with 3.13, and some of them with 3.12 and the oldest SQLAlchemy.

"""
_DATABASES = """
The tests bring PostgreSQL 16. asyncmy, aiomysql and PyMySQL are tested on MariaDB, and not on MySQL
itself. MariaDB, PgBouncer and SQLite are those of the machine.
"""
_VERSIONS = {
    "SQLAlchemy": ("SQLAlchemy",),
    "drivers": ("asyncpg", "psycopg", "asyncmy", "aiomysql", "PyMySQL", "aiosqlite"),
    "frameworks": ("Starlette", "FastAPI", "Litestar", "Quart", "Falcon", "BlackSheep", "Django"),
    "servers": ("uvicorn", "hypercorn", "granian", "daphne"),
    "others": ("anyio", "greenlet", "uvloop", "httptools", "h11", "trio"),
}
# Names that the tests give to drivers, and the names of the page.
_COLUMNS = {
    "sqlite": "aiosqlite",
    "sqlite-sync": "pysqlite",
    "psycopg-sync": "psycopg (sync)",
    "pymysql-sync": "PyMySQL",
}
_LOCKS = Path(__file__).parents[1] / "requirements"
_MARKS = {"failed": "✗", "passed": "✓"}  # the worst result first


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="FILE", help="write the tables of what was tested to FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "matrix(table, parameter): a row of a table in the docs")
    # Register the plugin last, so that it runs before plugins that shuffle the tests.
    config.pluginmanager.register(Places())
    if config.option.matrix and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Matrix(Path(config.option.matrix)), "matrix-writer")


def head() -> str:
    """Return the page up to the first table of results."""
    locks = "\n".join((_LOCKS / name).read_text() for name in ("ci.txt", "oldest.txt"))
    rows = [_line(["", "versions"]), _line(["---", "---"])]
    for kind, names in _VERSIONS.items():
        rows.append(_line([kind, ", ".join(f"{each} {_locked(each, locks)}" for each in names)]))
    return TITLE + "\n".join(rows) + "\n" + _DATABASES


def _locked(name: str, locks: str) -> str:
    found = set(re.findall(rf"^{name.lower()}==([\d.]+)", locks, re.MULTILINE))
    return " and ".join(sorted(found, key=lambda version: [*map(int, version.split("."))]))


class Places:
    """Tells each marked test its place, which its reports then carry."""

    # Run before plugins that put the tests in random order.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> Iterator[None]:
        for number, item in enumerate(items):
            mark = item.get_closest_marker("matrix")
            if mark is not None:
                table, parameter = mark.args
                column = str(item.callspec.params[parameter])
                column = _COLUMNS.get(column, column)
                row = (item.function.__doc__ or item.function.__name__).splitlines()[0].rstrip(".")
                item.user_properties.append(("matrix", [number, table, row, column]))
        yield


class Matrix:
    """Collects the outcome of every marked test."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._places: dict[str, tuple[int, str, str, str]] = {}
        self._outcomes: dict[str, set[str]] = defaultdict(set)
        self._tables: dict[str, dict[str, dict[str, set[str]]]] = defaultdict(dict)
        self._columns: dict[str, dict[str, None]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        place: Any = dict(report.user_properties).get("matrix")
        if place is None:
            return
        self._places[report.nodeid] = place
        if report.when != "call" and report.outcome == "passed":
            return
        mark: str = report.outcome
        if isinstance(report.longrepr, tuple) and report.skipped:
            mark += report.longrepr[2].removeprefix("Skipped")
        self._outcomes[report.nodeid].add(mark)

    def pytest_sessionfinish(self) -> None:
        for name, (_, table, row, column) in sorted(self._places.items(), key=itemgetter(1)):
            cells = self._tables[table].setdefault(row, defaultdict(set))
            cells[column] |= self._outcomes[name]
            self._columns[table][column] = None
        parts = [head(), *(self._table(title) for title in sorted(self._tables))]
        self._file.write_text("\n".join(parts))

    def _table(self, title: str) -> str:
        columns = list(self._columns[title])
        # Sort by text, because the order of the tests is random.
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


if __name__ == "__main__":
    file = Path(sys.argv[1])
    _, heading, tables = file.read_text().partition("\n## Drivers\n")
    file.write_text(head() + heading + tables)
