"""Starts a real Galera cluster of three nodes with the installed `mariadbd`."""

import atexit
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from machine import library, program
from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

# The first options are required by Galera; the others make a temporary server fast.
_OPTIONS = (
    "--bind-address=127.0.0.1",
    "--wsrep-on=ON",
    "--wsrep-sst-method=rsync",
    "--binlog-format=ROW",
    "--innodb-autoinc-lock-mode=2",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-flush-method=nosync",
    "--innodb-buffer-pool-size=16M",
    "--innodb-log-file-size=8M",
    "--skip-performance-schema",
)
# Shorten the time limits of the group communication: on one machine no packets are lost.
_QUICK = "gcache.size=16M;gmcast.time_wait=PT0.2S;evs.join_retrans_period=PT0.1S"


@cache
def nodes() -> tuple[URL, ...]:
    """Start the nodes once per process, and return the URLs of an empty database on each node."""
    provider, server, install = (
        library("libgalera_smm.so"),
        program("mariadbd"),
        program("mariadb-install-db"),
    )
    program("rsync")
    folder = Path(tempfile.mkdtemp(prefix="galera-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Each server needs its own directory: servers that start at once would share files in /tmp.
    temporary = folder / "tmp"
    temporary.mkdir()
    _owner(temporary)
    place = [f"--user={_owner(folder)}", f"--tmpdir={temporary}"]
    subprocess.run(
        [
            *(install, "--no-defaults", f"--datadir={folder / '0'}", *place),
            *("--skip-test-db", "--auth-root-authentication-method=normal"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ports = _free_ports(12)
    urls = []
    for number in range(3):
        data, path = folder / str(number), folder / f"socket{number}"
        data.mkdir(exist_ok=True)
        _owner(data)
        own, transfer, increments, sql = ports[number::3]
        command = [
            *(server, "--no-defaults", f"--datadir={data}", f"--socket={path}", f"--port={sql}"),
            *(*place, *_OPTIONS, f"--wsrep-provider={provider}"),
            f"--wsrep-cluster-address=gcomm://127.0.0.1:{ports[0]}",
            f"--wsrep-node-address=127.0.0.1:{own}",
            f"--wsrep-sst-receive-address=127.0.0.1:{transfer}",
            f"--wsrep-provider-options=base_port={own};ist.recv_addr=127.0.0.1:{increments};{_QUICK}",
        ]
        if number == 0:
            command.append("--wsrep-new-cluster")
        _start(command, folder / f"log{number}")
        url = URL.create("mysql", "root", host="localhost", query={"unix_socket": str(path)})
        if number == 0:
            _await(url, "wsrep_local_state_comment", "Synced", folder)
        urls.append(url)
    for url in urls:
        _await(url, "wsrep_local_state_comment", "Synced", folder)
        _await(url, "wsrep_cluster_size", "3", folder)
    engine = create_engine(urls[0].set(drivername="mysql+pymysql"), poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text("CREATE DATABASE tests"))
    return tuple(url.set(database="tests") for url in urls)


def _owner(folder: Path) -> str:
    """Return the user for the nodes: rsync gives up root's rights, and needs to write files."""
    if os.getuid() != 0:
        return str(os.getuid())
    shutil.chown(folder, "mysql")
    return "mysql"


def _start(command: list[str], log: Path) -> None:
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stderr=stream)

    def stop() -> None:
        process.kill()
        process.wait()

    atexit.register(stop)


def _await(url: URL, variable: str, value: str, folder: Path) -> None:
    path = Path(str(url.query["unix_socket"]))
    engine = create_engine(url.set(drivername="mysql+pymysql"), poolclass=NullPool)
    query = text(f"SHOW STATUS LIKE '{variable}'")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        # PyMySQL does not close its socket if it cannot connect.
        if path.exists():
            try:
                with engine.connect() as connection:
                    if connection.execute(query).one()[1] == value:
                        return
            except OperationalError:
                pass  # the node is not ready yet
        time.sleep(0.05)
    logs = "".join(each.read_text()[-3000:] for each in folder.glob("log*"))
    raise RuntimeError(logs)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
