"""Starts a real PgBouncer in front of the tests' PostgreSQL, with transaction pooling."""

import atexit
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import postgres
from machine import program
from sqlalchemy import URL

_SETTINGS = """
[databases]
* = host={server} user=postgres
[pgbouncer]
unix_socket_dir = {folder}
listen_addr =
listen_port = 6432
auth_type = any
pool_mode = transaction
default_pool_size = 3
min_pool_size = 3
server_round_robin = 1
server_check_delay = 0
logfile = {folder}/log
{user}
"""


@cache
def _folder() -> Path:
    """Start PgBouncer once per process, and return the directory of its socket."""
    bouncer = program("pgbouncer")
    server = postgres.server()
    folder = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
    # PgBouncer refuses to run as root, so it runs as the user of the server.
    user = f"user = {server.system_user}" if server.system_user else ""
    folder.chmod(0o777)
    settings = folder / "settings.ini"
    settings.write_text(_SETTINGS.format(server=server.pgdata, folder=folder, user=user))
    process = subprocess.Popen([bouncer, "-q", settings])

    def remove() -> None:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    deadline = time.monotonic() + 60
    while not (folder / ".s.PGSQL.6432").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError((folder / "log").read_text())
        time.sleep(0.02)
    return folder


def version() -> tuple[int, ...]:
    """Return the version of PgBouncer."""
    shown = subprocess.run([program("pgbouncer"), "--version"], capture_output=True, check=True)
    return tuple(map(int, shown.stdout.split()[1].split(b".")))


def url_through(url: URL) -> URL:
    """Return the URL of the same database through PgBouncer; skip the test without PgBouncer."""
    return url.update_query_dict({"host": str(_folder()), "port": "6432"})
