"""Whatever the README shows works when it is pasted."""

import re
from pathlib import Path

import pytest
from pages import Page
from starlette.testclient import TestClient

from asgi_dbsession.testing import rolled_back

README = Page("README.md")
BLOCKS = README.blocks()


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with nothing but what it imports."""
    monkeypatch.chdir(tmp_path)
    README.run(number)


def test_the_first_example_stores_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each visit is counted, also by the next server."""
    monkeypatch.chdir(tmp_path)
    for visits in ({"visits": 1}, {"visits": 2}):
        with TestClient(README.run(0)["app"]) as client:
            assert client.get("/").json() == visits


def test_the_example_of_a_def_handler_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in the framework's thread pool."""
    monkeypatch.chdir(tmp_path)
    (number,) = (number for number, block in enumerate(BLOCKS) if "def version" in block)
    with TestClient(README.run(number)["app"]) as client:
        assert client.get("/").text.startswith("3.")


def test_the_example_of_a_grown_application_does_what_the_list_below_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two databases, each option, and a test around it that undoes all."""
    monkeypatch.chdir(tmp_path)
    (number,) = (number for number, block in enumerate(BLOCKS) if "def health" in block)
    shown = README.run(number)
    with rolled_back(shown["shop"], shown["reports"]), TestClient(shown["app"]) as client:
        answer = client.get("/health")
    assert answer.status_code == 200
    assert answer.json()["latency"] > 0


def test_every_error_is_in_the_table_of_the_readme() -> None:
    """With its cure, where it is looked for."""
    import asgi_dbsession  # noqa: PLC0415

    errors = {
        name
        for name in asgi_dbsession.__all__
        if isinstance(value := getattr(asgi_dbsession, name), type) and issubclass(value, Exception)
    } - {"DBSessionError"}
    assert errors == set(re.findall(r"^\| `(\w+)` \|", README.text, re.MULTILINE))
