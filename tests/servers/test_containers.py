"""The page on containers: its command, probes and gunicorn, as real processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import postgres
import pytest
import yaml  # type: ignore[import-untyped]
from conftest import becomes_true
from pages import ROOT, Page
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/containers.md")
LISTENS = re.compile(r"(?:running on|Listening at:) http://[\d.]+:(\d+)")
GUNICORN = PAGE.commands()[0].split()
# What an application does that uses its database while it is imported.
AT_IMPORT = """
from sqlalchemy import create_engine, text
from asgi_dbsession import SyncDatabase
used = SyncDatabase.from_engine(
    create_engine(database.url.set(drivername="postgresql+psycopg"), pool_size=1)
)
with used.begin() as session:
    imported = session.scalar(text("SELECT pg_backend_pid()"))

@app.get("/backends")
def backends() -> list[int]:
    import os
    with used.begin() as session:
        return [os.getpid(), imported, session.scalar(text("SELECT pg_backend_pid()"))]
"""


def docker_command() -> list[str]:
    """What the container runs, on a port that is free."""
    written = PAGE.blocks("dockerfile")[0].partition("CMD ")[2].replace("\\\n", "")
    command: list[str] = json.loads(written)
    command[command.index("--port") + 1] = "0"
    command[command.index("--host") + 1] = "127.0.0.1"
    return command


class Process:
    """A server of the page in a folder with its files.

    Args:
        command: Its command line.
        folder: Where its files are.
        url: The `DATABASE_URL` it gets.
    """

    def __init__(self, command: list[str], folder: Path, url: str) -> None:
        self._printed = Path(tempfile.mkstemp(dir=folder.parent)[1])
        with self._printed.open("wb") as printed:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=folder,
                env=os.environ
                | {"DATABASE_URL": url, "HOME": str(folder), "PYTHONPATH": str(ROOT)},
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def printed(self) -> str:
        """All that it printed so far."""
        return self._printed.read_text()

    @property
    def url(self) -> str:
        """Where it listens; empty until it does."""
        found = LISTENS.search(self.printed)
        return f"http://127.0.0.1:{found.group(1)}" if found else ""

    def serves(self) -> bool:
        """Whether it answers."""
        assert self.process.poll() is None, self.printed
        try:
            return bool(self.url) and httpx2.get(f"{self.url}/alive").status_code == 200
        except httpx2.TransportError:
            return False

    def kill(self) -> None:
        """End all of its processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def reader() -> Engine:
    """A way to an empty table."""
    url = postgres.new_database("containers").set(drivername="postgresql+psycopg")
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (id serial PRIMARY KEY, product text)"))
    return engine


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path, reader: Engine) -> Iterator[Start]:
    """Starts a server; all of them end with the test."""
    folder = tmp_path / "app"
    folder.mkdir()
    started: list[Process] = []
    at = reader.url.set(drivername="postgresql").render_as_string(hide_password=False)

    def start(command: list[str], *, url: str = at, more: str = "", **settings: Any) -> Process:
        files = PAGE.files()
        (folder / "shop.py").write_text(files["shop.py"] + more)
        lines = [files["gunicorn.conf.py"], 'bind = "127.0.0.1:0"', "control_socket_disable = True"]
        lines += [f"{name} = {value!r}" for name, value in settings.items()]
        (folder / "gunicorn.conf.py").write_text("\n".join(lines))
        started.append(Process(command, folder, url))
        return started[-1]

    yield start
    for each in started:
        each.kill()


CASES = {
    "docker": (docker_command(), {}),
    "gunicorn": (GUNICORN, {}),
    "gunicorn, its own worker": (GUNICORN, {"worker_class": "asgi"}),
}


@pytest.mark.parametrize(("command", "settings"), CASES.values(), ids=CASES)
async def test_a_running_request_is_stored_and_answered_at_sigterm(
    start: Start, reader: Engine, command: list[str], settings: dict[str, str]
) -> None:
    """And then the process ends, within its time."""
    server = start(command, **settings)
    await becomes_true(server.serves, 30)
    assert httpx2.get(f"{server.url}/ready").json() == {"ready": True}
    with ThreadPoolExecutor() as threads, reader.begin() as other:
        other.execute(text("LOCK TABLE orders IN EXCLUSIVE MODE"))
        address = f"{server.url}/orders?product=tea"
        response = threads.submit(httpx2.post, address, timeout=20)
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        await becomes_true(lambda: _scalar(reader, waiting) == 1)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(0.5)
        other.rollback()
        assert response.result().status_code == 201
    assert server.process.wait(20) in (0, -signal.SIGTERM)
    assert _scalar(reader, "SELECT count(*) FROM orders") == 1


def _scalar(reader: Engine, query: str) -> Any:
    with reader.connect() as connection:
        return connection.scalar(text(query))


async def test_a_pod_without_its_database_lives_and_is_not_ready(
    start: Start, reader: Engine
) -> None:
    """It is ready again without a restart, once the database is back."""
    server = start(docker_command())
    await becomes_true(server.serves, 30)
    administrator = create_engine(
        postgres.administrator_url(), isolation_level="AUTOCOMMIT", poolclass=NullPool
    )
    with administrator.connect() as connection:
        for status, before, after in (
            (503, "containers", "containers_away"),
            (200, "containers_away", "containers"),
        ):
            end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
            connection.execute(text(end), {"name": before})
            connection.execute(text(f"ALTER DATABASE {before} RENAME TO {after}"))
            assert httpx2.get(f"{server.url}/ready").status_code == status
            assert httpx2.get(f"{server.url}/alive").status_code == 200


async def test_workers_of_gunicorn_share_no_connection(start: Start) -> None:
    """Not the connection that was used at import, before the fork."""
    server = start(GUNICORN, more=AT_IMPORT, preload_app=True)
    await becomes_true(server.serves, 30)
    seen: dict[int, tuple[int, int]] = {}

    def ask() -> bool:
        with ThreadPoolExecutor(4) as threads:
            for found in threads.map(httpx2.get, [f"{server.url}/backends"] * 8):
                process, imported, backend = found.json()
                seen[process] = (imported, backend)
        return len(seen) == 2

    await becomes_true(ask, 30)
    (imported, backend), (other_imported, other_backend) = seen.values()
    assert imported == other_imported
    assert len({imported, backend, other_backend}) == 3


async def test_without_its_database_the_server_says_why(start: Start) -> None:
    """And ends, so that whoever watches it starts it again."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"postgresql://app:hush@127.0.0.1:{closed.getsockname()[1]}/shop"
        for command in (docker_command(), GUNICORN):
            server = start(command, url=url)
            assert server.process.wait(60) != 0, server.printed
            assert "cannot be reached" in server.printed
            assert "hush" not in server.printed


def test_the_manifest_fits_the_application() -> None:
    """Its probes are routes, and its times add up."""
    spec = yaml.safe_load(PAGE.blocks("yaml")[0])["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    shop = PAGE.files()["shop.py"]
    for probe in ("livenessProbe", "readinessProbe"):
        assert f'@app.get("{container[probe]["httpGet"]["path"]}")' in shop
    within = re.findall(r"within=(\d+)", shop)[0]
    assert container["readinessProbe"]["timeoutSeconds"] > int(within)
    command = docker_command()
    grace = int(command[command.index("--timeout-graceful-shutdown") + 1])
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > grace + sleep
