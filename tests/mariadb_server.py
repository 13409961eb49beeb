"""Starts a temporary MariaDB server with the installed `mariadbd`."""

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

# The server has no TLS. Without this argument, PyMySQL loads all certificates of the machine first.
NO_TLS = {"ssl_disabled": True}
USER = "app"  # an ordinary user, because a read-only server does not refuse root

# Switch durability off: it costs time, and the data is deleted anyway.
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
    """Start the server once per process; at the end of the process, stop it and delete its data."""
    server, install = program("mariadbd"), program("mariadb-install-db")
    folder = Path(tempfile.mkdtemp(prefix="mariadb-"))
    path = folder / "socket"
    # Each server needs its own directory: servers that start at once would share files in /tmp.
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
    """Return the URL of root with a blocking driver; skip the test without a server."""
    return URL.create(
        "mysql+pymysql", "root", host="localhost", query={"unix_socket": str(_socket())}
    )


def new_database(name: str) -> tuple[URL, URL]:
    """Create an empty database, and return its URLs for an ordinary user and for root."""
    root = administrator_url()
    engine = create_engine(
        root, isolation_level="AUTOCOMMIT", poolclass=NullPool, connect_args=NO_TLS
    )
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS `{name}`"))
        connection.execute(text(f"CREATE DATABASE `{name}`"))
        connection.execute(text(f"CREATE USER IF NOT EXISTS {USER}@localhost"))
        connection.execute(text(f"GRANT ALL ON `{name}`.* TO {USER}@localhost"))
    return root.set(database=name, username=USER), root.set(database=name)


def _await_answer(process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        # Do not try with the driver: PyMySQL does not close its socket if it cannot connect.
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(str(path))
            return
        time.sleep(0.02)
    raise RuntimeError(log.read_text()[-3000:])
