"""Tests that the testing guide works when its files are pasted, with each plugin that it names."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from sqlite3 import connect

import postgres
import pytest
from machine import FEW_PLUGINS
from sqlalchemy import URL

import asgi_dbsession

GUIDE = Path(__file__).parents[1] / "docs" / "how-to" / "testing.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
SHOP, CONFTEST, TESTS, SYNC_CONFTEST, SYNC_TESTS, RUNNING_CLIENT, PARALLEL = BLOCKS
INI = re.findall(r"^(asyncio\w+) = (\w+)$", GUIDE.read_text(), re.MULTILINE)
# Only anyio needs these: a fixture, for each test that uses it, and the mark.
ANYIO = (
    r'\n\n@pytest.fixture\(scope="session"\)\ndef anyio_backend.*?"asyncio"\n'
    r"|anyio_backend|pytestmark.*?\n"
)
FIRST_LINES = r"\A.*?(?=\nimport httpx2\n)"


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """An empty database for an async driver, by default on PostgreSQL."""
    if getattr(request, "param", None) == "sqlite":
        return URL.create("sqlite+aiosqlite", database=str(tmp_path / "test.db"))
    return postgres.new_database("guide").set(drivername="postgresql+psycopg")


def run(folder: Path, conftest: str, tests: str, *options: str, **variables: str) -> str:
    """Run pytest on files of the guide, with warnings as errors, and return its output."""
    for name, text in (("shop", SHOP), ("conftest", conftest), ("test_items", tests)):
        (folder / f"{name}.py").write_text(text)
    path = [str(Path(asgi_dbsession.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    command = ["-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *options]
    finished = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(path), "PYTEST_ADDOPTS": ""}
        | FEW_PLUGINS
        | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


BOTH = pytest.mark.parametrize("url", ["sqlite", "postgresql"], indirect=True)


def shown(url: URL) -> str:
    """Return the URL with its password."""
    return url.render_as_string(hide_password=False)


@BOTH
def test_with_anyio(tmp_path: Path, url: URL) -> None:
    """The same names are free in each test."""
    printed = run(tmp_path, CONFTEST, TESTS, "-p", "anyio", TEST_DATABASE_URL=shown(url))
    assert "5 passed" in printed


@pytest.mark.skipif(not find_spec("pytest_asyncio"), reason="pytest-asyncio is not installed")
def test_with_pytest_asyncio(tmp_path: Path, url: URL) -> None:
    """The test runs without the parts that only anyio needs."""
    conftest, tests = (re.sub(ANYIO, "", each, flags=re.DOTALL) for each in (CONFTEST, TESTS))
    options = [part for name, value in INI for part in ("-o", f"{name}={value}")]
    assert len(options) == 6
    options += ["-p", "asyncio"]
    printed = run(tmp_path, conftest, tests, *options, TEST_DATABASE_URL=shown(url))
    assert "5 passed" in printed


@BOTH
def test_with_the_test_client(tmp_path: Path, url: URL) -> None:
    """The client runs the application in another thread."""
    assert "2 passed" in run(tmp_path, SYNC_CONFTEST, SYNC_TESTS, TEST_DATABASE_URL=shown(url))


def test_with_a_test_client_for_the_whole_session(tmp_path: Path, url: URL) -> None:
    """The rollback block is inside of the client, and works in the client's event loop."""
    before, fixture, _ = SYNC_CONFTEST.partition("@pytest.fixture\ndef client")
    assert fixture
    conftest = before + RUNNING_CLIENT
    assert "2 passed" in run(tmp_path, conftest, SYNC_TESTS, TEST_DATABASE_URL=shown(url))


@pytest.mark.parametrize("conftest", [CONFTEST, SYNC_CONFTEST], ids=["async", "sync"])
def test_the_tables_of_the_developer_are_not_dropped(tmp_path: Path, conftest: str) -> None:
    """The guides say `export DATABASE_URL=…`, and `conftest.py` drops tables elsewhere."""
    mine = tmp_path / "mine.db"
    with connect(mine) as connection:
        connection.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT)")
        connection.execute("INSERT INTO item VALUES (1, 'mine')")
    tests = TESTS if conftest is CONFTEST else SYNC_TESTS
    run(tmp_path, conftest, tests, "-p", "anyio", DATABASE_URL=f"sqlite:///{mine}")
    assert connection.execute("SELECT name FROM item").fetchall() == [("mine",)]
    connection.close()
    assert (tmp_path / "test.db").exists()


def test_in_parallel_processes(tmp_path: Path) -> None:
    """Each process has its own database."""
    conftest = PARALLEL + re.sub(FIRST_LINES, "", CONFTEST, flags=re.DOTALL)
    server = postgres.administrator_url()
    options = ("-p", "xdist", "-n", "2", "-p", "anyio")
    printed = run(tmp_path, conftest, TESTS, *options, TEST_DATABASE_URL=shown(server))
    assert "2 workers" in printed or "bringing up nodes" in printed
    assert "5 passed" in printed
