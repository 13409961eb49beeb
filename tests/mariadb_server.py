"""A real MariaDB server, thrown away afterwards, from the machine's own `mariadbd`."""

import atexit
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from machine import program
from sqlalchemy import URL, create_engine, text
from sqlalchemy.pool import NullPool

USER = "app"  # an ordinary one: a server that is read-only refuses him, and not root

# Durability costs a test its time, and nothing here outlives the process.
_FAST = (
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-flush-method=nosync",
    "--innodb-buffer-pool-size=16M",
    "--innodb-log-file-size=8M",
    "--skip-performance-schema",
    "--skip-log-bin",
)


@cache
def _socket() -> Path:
    """Start it once per process; it stops, and its data goes, with the process."""
    server, install = program("mariadbd"), program("mariadb-install-db")
    folder = Path(tempfile.mkdtemp(prefix="mariadb-"))
    path = folder / "socket"
    # Of its own: servers that are made at the same time would take each other's files in /tmp.
    temporary = folder / "tmp"
    temporary.mkdir()
    place = ["--no-defaults", f"--datadir={folder / 'data'}", f"--tmpdir={temporary}"]
    if os.getuid() == 0:
        place.append("--user=root")
    subprocess.run(
        [install, *place, "--auth-root-authentication-method=normal", "--skip-test-db"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [server, *place, f"--socket={path}", "--skip-networking", *_FAST], stderr=log
        )

    def remove() -> None:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    _await_answer(process, path, folder / "log")
    return path


def administrator_url() -> URL:
    """The URL of its root, with a blocking driver; skips the test where there is no server."""
    return URL.create(
        "mysql+pymysql", "root", host="localhost", query={"unix_socket": str(_socket())}
    )


def new_database(name: str) -> tuple[URL, URL]:
    """Create an empty database; its URL for an ordinary user, and for root."""
    root = administrator_url()
    engine = create_engine(root, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS `{name}`"))
        connection.execute(text(f"CREATE DATABASE `{name}`"))
        connection.execute(text(f"CREATE USER IF NOT EXISTS {USER}@localhost"))
        connection.execute(text(f"GRANT ALL ON `{name}`.* TO {USER}@localhost"))
    return root.set(database=name, username=USER), root.set(database=name)


def _await_answer(process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        # Not with the driver: PyMySQL forgets to close a socket that cannot connect.
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(str(path))
            return
        time.sleep(0.02)
    raise RuntimeError(log.read_text()[-3000:])
