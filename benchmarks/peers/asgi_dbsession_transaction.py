"""The application with this package, which reads in a transaction too."""

from typing import Any

from asgi_dbsession import AsyncDatabase

from . import work
from .asgi_dbsession import application

database = AsyncDatabase(work.URL, autocommit_reads=False, **work.POOL)
app = application(database)


def pool() -> Any:
    """Return the pool of the application."""
    return database.engine.pool
