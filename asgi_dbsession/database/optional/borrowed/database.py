"""Makes a database object that uses an engine of the application."""

from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbsession.database.engines import sync_engine_of
from asgi_dbsession.errors import ConfigurationError

from .listeners import borrow


def database_of(engine: Any, kind: Any, **options: Any) -> Any:
    """Return a database object of the class `kind`, which uses the engine.

    Raises:
        ConfigurationError: `engine` is not an engine, or is of the wrong kind (async or sync).
    """
    needed = AsyncEngine if kind.is_async else Engine
    if not isinstance(engine, needed):
        raise ConfigurationError(
            f"{kind.__name__} needs an engine of the class {needed.__name__}, not "
            f"{type(engine).__name__}."
        )
    database = kind(engine.url, **options)
    database._engine = engine
    database._owns_engine = False
    borrow(sync_engine_of(engine), database, database._observers)
    return database
