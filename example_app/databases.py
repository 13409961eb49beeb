"""The databases of the shop. They are described here, and started by the middleware."""

import os
from typing import Any

from asgi_dbsession import AsyncDatabase


def describe_database(url: str) -> AsyncDatabase:
    """The database at a URL; on SQLite, each of its connections is set up."""
    if url.startswith("sqlite"):
        return AsyncDatabase(url, pool_events=[(set_up_sqlite, "connect")])
    return AsyncDatabase(url)


def set_up_sqlite(connection: Any, _record: object) -> None:
    """Let SQLite check foreign keys, read during a write, and wait for the writer."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout = 5000")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()


shop = describe_database(os.environ.get("DATABASE_URL") or "sqlite:///shop.db")
reports = describe_database(os.environ.get("REPORT_DATABASE_URL") or "sqlite:///reports.db")
