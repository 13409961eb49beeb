"""Runs the tests on a copy of the repository that has one mutation."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from .mutations import Mutation

_COPIED = ("asgi_dbsession", "benchmarks", "docs", "example_app", "tests")
_CACHES = shutil.ignore_patterns("__pycache__")
# The timer is a thread that ends the process: a mutant in an endless loop cannot be stopped.
_PYTEST = (
    *("-m", "pytest", "-x", "-q", "-n0", "-p", "no:randomly", "-p", "no:cacheprovider"),
    "--timeout-method=thread",
)
# Tests for the files of each room, beside the test of the same name: the fast ones first.
_ROOMS = {
    "session": (
        *("lock", "reads", "reads_committed", "read_only", "silent_losses", "several_tasks"),
        *("several_databases", "two_phases", "retry", "field"),
    ),
    "unit": (
        *("other_tasks", "on_commit", "database", "nesting", "websocket", "several_tasks"),
        *("several_databases", "two_phases", "reads_committed"),
    ),
    "asgi": (
        *("misuse", "lifespan", "nesting", "open_block", "websocket", "on_commit", "events"),
        "starlette",
    ),
    "database": ("database", "url", "bad_input", "health", "lifespan"),
    "join": ("join", "read_only", "several_tasks"),
    "read_only": ("read_only", "join"),
    "after_commit": ("on_commit", "join"),
    "failures": ("lifespan", "bad_input", "overload"),
    "health": ("health",),
    "urls": ("url", "hosting_providers", "drivers"),
    "borrowed": ("database", "released"),
    "reads": ("reads", "isolation"),
    "optional": ("events", "silent_losses", "sqlite"),
    "two_phases": ("two_phases",),
}
_FEW_DRIVERS = "not sqlite-sync and not psycopg-sync"
# Tests for a single file, which run first, with all drivers.
_FILES = {
    "answer": "field",
    "async_guard": "misuse",
    "at_once": "threads",
    "attempt": "retry_on",
    "base": "replicas",
    "block": "join",
    "blocks": "join",
    "callback": "join",
    "commit": "two_phases",
    "companion": "report",
    "completion": "trio cancellation",
    "connecting": "cancellation",
    "discard": "cancellation",
    "end": "report",
    "ending": "report",
    "engine_life": "forks",
    "failures": "sqlite",
    "guard": "reads_mariadb",
    "in_memory": "database",
    "lost": "replicas_lost",
    "mariadb": "reads_mariadb",
    "mariadb_connections": "reads_mariadb",
    "names": "two_phases",
    "refusals": "read_only",
    "roll_back": "two_phases",
    "rules": "read_only commit_when",
    "session": "two_phases",
    "shares": "field",
    "tasks": "trio",
    "thread_lock": "several_tasks",
    "together": "threads several_databases",
    "transaction": "read_only",
    "unit_of_work": "report live",
}
# These tests start processes and tools: they are slow, and show nothing about a single line.
_FAR = (
    *("servers", "frameworks", "test_benchmarks.py", "test_comparison.py", "test_example.py"),
    *("test_faults.py", "test_galera.py", "test_package.py", "test_site.py", "test_tutorial.py"),
)
# Seconds for one test, and for all of them. After a time-out they run again with twice the seconds,
# because a busy machine must not kill a mutant. pytest-timeout writes this text after a time-out.
_TEST_LIMIT, _LIMIT = 30, 900
_TIMED_OUT = "+ Timeout +"
_MEMORY = 3 * 1024**3  # bytes of one process: an endless loop must not use all memory


def copy(root: Path, folder: Path) -> None:
    """Copy all files that the tests need, so that later edits do not change a result."""
    for each in _COPIED:
        shutil.copytree(root / each, folder / each, ignore=_CACHES)
    for each in ("README.md", "CHANGELOG.md", "pyproject.toml", "setup.cfg"):
        shutil.copy(root / each, folder)


def survives(root: Path, mutation: Mutation, *, near_only: bool) -> bool:
    """Return True if all tests pass: first the tests of the mutated file, then the others."""
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        copy(root, folder)
        (folder / mutation.file).write_text(mutation.after)
        runs = [("--quick", "-k", _FEW_DRIVERS, *_near(folder, mutation))]
        if first := _FILES.get(Path(mutation.file).stem, "").split():
            runs.insert(0, tuple(f"tests/test_{name}.py" for name in first))
        if not near_only:
            runs.append(("tests", *(f"--ignore=tests/{each}" for each in _FAR)))
        return all(_pass(folder, each) for each in runs)


def _near(folder: Path, mutation: Mutation) -> list[str]:
    file = Path(mutation.file)
    names = dict.fromkeys((file.stem, "middleware", *_ROOMS.get(file.parent.name, ())))
    tests = [Path("tests", f"test_{name}.py") for name in names]
    return [str(each) for each in tests if (folder / each).exists()]


def _pass(folder: Path, arguments: tuple[str, ...]) -> bool:
    for factor in (1, 2):
        status, output = _run(folder, arguments, factor)
        if status is not None and _TIMED_OUT not in output:
            break
    return status == 0


def _run(folder: Path, arguments: tuple[str, ...], factor: int) -> tuple[int | None, str]:
    """Return the exit status of the tests (None after a time-out), and their output."""
    output = folder / "output.txt"
    with output.open("wb") as written:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, *_PYTEST, f"--timeout={factor * _TEST_LIMIT}", *arguments],
            cwd=folder,
            # Run in this folder, so that servers of the tests can be found after a crash.
            env={**os.environ, "PYTHONPATH": str(folder), "TMPDIR": str(folder)},
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    resource.prlimit(process.pid, resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    status = None
    try:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(factor * _LIMIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for each in folder.rglob("postmaster.pid"):  # PostgreSQL has its own session
            with suppress(ProcessLookupError):
                os.kill(int(each.read_text().split()[0]), signal.SIGQUIT)
        process.wait()
    return status, output.read_text(errors="replace")
