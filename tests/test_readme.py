"""Tests that the examples of the README work when they are pasted."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, Page
from starlette.testclient import TestClient

from asgi_dbsession.testing import rolled_back

README = Page("README.md")
BLOCKS = README.blocks()


def pages() -> list[Page]:
    """The README, the documents of the project, and every page of the site."""
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return [Page(str(path.relative_to(ROOT))) for path in paths]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run it in an empty folder, with only the packages that it imports."""
    monkeypatch.chdir(tmp_path)
    README.run(number)


def test_the_first_example_answers_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request below the code gets the answer below it, and the note is stored."""
    monkeypatch.chdir(tmp_path)
    asked = next(block for block in README.blocks("bash") if block.startswith("curl"))
    (path,) = re.findall(r"^curl -X POST 'localhost:8000(\S+)'\n$", asked)
    answer = json.loads(README.blocks("json")[0])
    for number in (1, 2):
        with TestClient(README.run(0)["app"]) as client:  # a new server for each request
            response = client.post(path)
        assert (response.status_code, response.json()) == (201, answer * number)


def test_the_example_of_a_def_handler_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The `def` handler runs in the framework's thread pool."""
    monkeypatch.chdir(tmp_path)
    (number,) = (number for number, block in enumerate(BLOCKS) if "def version" in block)
    with TestClient(README.run(number)["app"]) as client:
        assert client.get("/").text.startswith("3.")


def test_the_example_of_a_grown_application_does_what_the_list_below_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks are tested with two databases, each option, and a test that is rolled back."""
    monkeypatch.chdir(tmp_path)
    (number,) = (number for number, block in enumerate(BLOCKS) if "def health" in block)
    shown = README.run(number)
    with rolled_back(shown["shop"], shown["reports"]), TestClient(shown["app"]) as client:
        answer = client.get("/health")
    assert answer.status_code == 200
    assert answer.json()["latency"] > 0


def test_commands_are_pasted_as_they_stand() -> None:
    """A block of commands has no prompt and no output, and is correct shell syntax."""
    for page in pages():
        assert page.blocks("console") == []
        for block in page.blocks("bash"):
            assert not re.search(r"^\$ ", block, re.MULTILINE), page.path
            finished = subprocess.run(["bash", "-n"], input=block, text=True, check=False)
            assert finished.returncode == 0, block


def test_code_is_at_most_80_columns_wide() -> None:
    """Code is narrow enough for the site and for a terminal."""
    wide = [
        (page.path, line)
        for page in pages()
        for language in (
            "python",
            "diff",
            "bash",
            "sql",
            "ini",
            "toml",
            "json",
            "yaml",
            "dockerfile",
        )
        for block in page.blocks(language)
        for line in block.splitlines()
        if len(line) > 80
    ]
    assert wide == []


def test_code_is_formatted() -> None:
    """Code is formatted like the package, except for its width."""
    ruff = [sys.executable, "-m", "ruff", "format", "--isolated", "--check"]
    paths = [str(ROOT / page.path) for page in pages()]
    finished = subprocess.run(
        [*ruff, "--line-length", "80", "--no-cache", *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_an_empty_line_follows_each_table() -> None:
    """Without it, the next sentence becomes a row of the table."""
    joined = [(page.path, found) for page in pages() for found in JOINED.findall(page.text)]
    assert joined == []


JOINED = re.compile(r"^\|.*\|\n[^|\n].*", re.MULTILINE)
# Phrases that a reader with English as a second language may not know.
IDIOMS = re.compile(
    r"hears? of|heard of|lost races?|by hand|\bis over\b|for good|at will|from the top|in vain",
    re.IGNORECASE,
)


def test_no_page_uses_an_idiom_that_has_a_plain_word() -> None:
    """Code, quoted messages and generated tables are not checked."""
    found = []
    for page in pages():
        if page.path == "docs/tested.md":
            continue
        prose = re.sub(r"^```.*?^```$", "", page.text, flags=re.DOTALL | re.MULTILINE)
        found += [(page.path, each.group(0)) for each in IDIOMS.finditer(prose)]
    assert found == []


def test_the_readme_has_the_commands_that_the_build_runs() -> None:
    """`.ci/run` reads the test command from the section with this name."""
    (command,) = README.blocks("bash", under="Run the tests")
    assert command.endswith(".venv/bin/python -m pytest\n")
