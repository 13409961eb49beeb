"""Tests that each recipe for workers and shells works with the real tool."""

import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis_server
from conftest import METADATA, postgresql
from pages import Page
from sqlalchemy import make_url, text

PAGE = Page("docs/how-to/workers.md")
pytestmark = [
    pytest.mark.skipif(not redis_server.is_installed, reason="there is no redis-server here"),
    pytest.mark.timeout(180),
]


def needs(module: str) -> pytest.MarkDecorator:
    """Skip a test if the tool is not installed."""
    return pytest.mark.skipif(not find_spec(module), reason=f"{module} is not installed")


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a broker."""
    with redis_server.redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Iterator[Path]:
    """The files of the page, and the table with one new order."""
    url, reader = postgresql("guides")
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name, code in PAGE.files().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    with reader.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS orders"))
        connection.execute(text("CREATE TABLE orders (id SERIAL PRIMARY KEY, state TEXT)"))
        connection.execute(text("INSERT INTO orders (state) VALUES ('new')"))
    yield tmp_path
    with reader.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS orders"))


def states() -> list[str]:
    """Return the stored rows."""
    with postgresql("guides")[1].connect() as connection:
        return list(connection.scalars(text("SELECT state FROM orders ORDER BY id")))


def command(name: str) -> list[str]:
    """Return the command of the page with this program, for the Python that runs the tests."""
    (line,) = [each for each in PAGE.commands() if each.startswith(f"{name} ")]
    words = os.path.expandvars(line).replace('"', "").split()
    return [str(Path(sys.executable).with_name(name)), *words[1:]]


@contextmanager
def worker(name: str, folder: Path) -> Iterator[None]:
    """Run a worker, and stop it as a process manager does."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command(name), cwd=folder, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def python(folder: Path, code: str) -> str:
    """Return the output of a program that sends a task."""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr + (folder / "log").read_text()
    return finished.stdout.strip()


@needs("celery")
def test_celery_prefork_ships_orders(folder: Path) -> None:
    """The parent process may have used its engine before the fork; an error rolls back."""
    tasks = folder / "celery_tasks.py"
    in_parent = (
        "\nwith sync_database, sync_database.begin() as session:\n    session.get(Order, 1)\n"
    )
    failing = (
        "\n@app.task\n@sync_database.begin()\ndef fail(number: int) -> None:\n"
        "    get_sync_session().get_one(Order, number).state = 'lost'\n    raise KeyError\n"
    )
    tasks.write_text(tasks.read_text() + in_parent + failing)
    with worker("celery", folder):
        code = (
            "import celery_tasks as tasks\n"
            "results = [tasks.ship.delay(1) for _ in range(8)]\n"
            "print({each.get(timeout=50) for each in results})\n"
            "print(type(tasks.fail.delay(1).get(timeout=50, propagate=False)).__name__)"
        )
        assert python(folder, code) == "{'shipped'}\nKeyError"
    assert states() == ["shipped"]


@needs("celery")
def test_celery_starts_without_its_database(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery ignores errors of its signals, so a child process would have no database for ever."""
    url = make_url(os.environ["DATABASE_URL"])
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        down = url.set(port=bound.getsockname()[1])
        monkeypatch.setenv("DATABASE_URL", down.render_as_string(hide_password=False))
        code = (
            "import celery_tasks as tasks\n"
            "from celery.signals import worker_process_init\n"
            "((_, failure),) = worker_process_init.send(None)\n"
            "print(failure, tasks.sync_database.is_running)"
        )
        (folder / "log").touch()
        assert python(folder, code) == "None True"


@needs("rq")
def test_rq_packs_orders(folder: Path) -> None:
    """Each job runs in a forked process."""
    code = (
        "import os, redis, rq, rq_tasks\n"
        "queue = rq.Queue(connection=redis.from_url(os.environ['REDIS_URL']))\n"
        "queue.enqueue(rq_tasks.pack, 1)"
    )
    python(folder, code)
    finished = subprocess.run(
        command("rq"), cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert states() == ["packed"], finished.stderr


@needs("arq")
def test_arq_invoices_orders(folder: Path) -> None:
    """The worker starts and stops the database in its event loop."""
    code = (
        "import asyncio, arq, arq_tasks\n"
        "async def main():\n"
        "    pool = await arq.create_pool(arq_tasks.WorkerSettings.redis_settings)\n"
        "    await pool.enqueue_job('invoice', 1)\n"
        "    await pool.aclose()\n"
        "asyncio.run(main())"
    )
    python(folder, code)
    finished = subprocess.run(
        command("arq"), cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert states() == ["invoiced"], finished.stdout + finished.stderr


@needs("taskiq_redis")
def test_taskiq_delivers_orders(folder: Path) -> None:
    """The result is returned after COMMIT."""
    with worker("taskiq", folder):
        code = (
            "import asyncio, taskiq_tasks as tasks\n"
            "async def main():\n"
            "    await tasks.broker.startup()\n"
            "    task = await tasks.deliver.kiq(1)\n"
            "    print((await task.wait_result(timeout=50)).return_value)\n"
            "    await tasks.broker.shutdown()\n"
            "asyncio.run(main())"
        )
        assert python(folder, code) == "delivered"
    assert states() == ["delivered"]


def type_into_shell(folder: Path, code: str) -> str:
    """Return what `python -m asyncio` prints for code that is typed."""
    finished = subprocess.run(
        [sys.executable, "-m", "asyncio"],
        cwd=folder,
        input=code,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return finished.stdout + finished.stderr


def paste_into_shell(folder: Path, code: str) -> str:
    """Return the same on a terminal: since Python 3.13, only a terminal takes blocks of code."""
    controller, terminal = pty.openpty()
    with (
        os.fdopen(controller, "r+b", buffering=0) as screen,
        subprocess.Popen(
            [sys.executable, "-m", "asyncio"],
            cwd=folder,
            env=os.environ | {"TERM": "xterm"},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        ) as shell,
    ):
        os.close(terminal)
        for block in [*code.strip().split("\n\n"), "exit()"]:
            screen.write(f"\x1b[200~{block}\n\x1b[201~\r".encode())
        shown = b""
        with suppress(OSError):  # the shell has closed the terminal
            while shown := shown + screen.read(65536):
                continue
        shell.wait(20)
    return shown.decode()


def test_a_shell_commits_each_block(folder: Path) -> None:
    """The code is pasted into `python -m asyncio`, as into a notebook."""
    enter = paste_into_shell if sys.version_info >= (3, 13) else type_into_shell
    shown = enter(folder, PAGE.files()["shell.py"])
    assert re.search(r"2 new in the shell", shown), shown
    assert states() == ["new", "new in the shell"]


@pytest.mark.parametrize("migrations", ["migrations", "sync_migrations"])
def test_alembic_makes_the_tables(folder: Path, migrations: str) -> None:
    """Both files find the database of the application, and nothing is left to migrate."""

    def alembic(*words: str) -> None:
        finished = subprocess.run(
            [sys.executable, "-m", "alembic", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr

    reader = postgresql("guides")[1]
    with reader.begin() as connection:
        connection.execute(text("DROP TABLE orders"))
    METADATA.drop_all(reader)  # else the migration drops them, in an order that may not work
    shutil.rmtree(folder / migrations)  # only its `env.py` is there
    alembic("init", migrations)
    (folder / migrations / "env.py").write_text(PAGE.files()[f"{migrations}/env.py"])
    try:
        for line in PAGE.commands("Alembic")[1:]:
            alembic(*shlex.split(line)[1:])
        with reader.begin() as connection:
            connection.execute(text("INSERT INTO orders (state) VALUES ('migrated')"))
        assert states() == ["migrated"]
    finally:
        with reader.begin() as connection:
            connection.execute(text("DROP TABLE IF EXISTS alembic_version"))
        METADATA.create_all(reader)
