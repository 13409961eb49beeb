"""A real PgBouncer, pooling by transaction in front of the PostgreSQL of the tests."""

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
    """Start it once per process, where its socket is; it goes with the process."""
    bouncer = program("pgbouncer")
    server = postgres.server()
    folder = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
    # It refuses to work as root, and so may work as the server's user.
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
    """Which PgBouncer it is."""
    shown = subprocess.run([program("pgbouncer"), "--version"], capture_output=True, check=True)
    return tuple(map(int, shown.stdout.split()[1].split(b".")))


def url_through(url: URL) -> URL:
    """The URL of the same database, through PgBouncer; skips the test where there is none."""
    return url.update_query_dict({"host": str(_folder()), "port": "6432"})
