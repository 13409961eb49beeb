"""Lets several sessions use an SQLite database in memory."""

from typing import Any

from sqlalchemy import URL
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool


def options_for_memory(url: URL, given: dict[str, Any]) -> dict[str, Any]:
    """Return engine options that let several sessions use an SQLite database in memory.

    By default, all sessions share the single connection of such a database, and so also its
    transaction. The rollback of one request would then undo work of other requests. With these
    options, a session waits until no other session uses the connection. Source:
    https://docs.sqlalchemy.org/en/20/dialects/sqlite.html#pooling-behavior
    """
    asynchronous = url.get_dialect().is_async
    options = dict(given)
    arguments = given.get("connect_args", {})
    if not asynchronous and isinstance(arguments, dict):
        # COMMIT may run in another thread than the statements before. By default, SQLite refuses
        # this. Here it is safe, because two threads never use the connection at the same time.
        options["connect_args"] = {"check_same_thread": False} | arguments
    if "poolclass" not in given and "pool" not in given:
        options["poolclass"] = AsyncAdaptedQueuePool if asynchronous else QueuePool
        options |= {"pool_size": 1, "max_overflow": 0}
    return options
