"""Makes a database object that uses an engine of the application."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbsession.database.engines import sync_engine_of
from asgi_dbsession.database.options import checked_options
from asgi_dbsession.errors import ConfigurationError, kind_of

from .listeners import borrow


def database_of(engine: Any, kind: Any, unknown: Mapping[str, object], **options: Any) -> Any:
    """Return a database object of the class `kind`, which uses the engine.

    Args:
        engine: The engine of the application.
        kind: The class of the database object.
        unknown: Arguments that `from_engine` does not take. There should be none.
        **options: Arguments for the class.

    Raises:
        ConfigurationError: `engine` is not an engine, or is of the wrong kind (async or sync), or
            another argument is wrong.
    """
    if unknown:
        from asgi_dbsession.database.optional.mistakes import no_option_of_from_engine

        checked_options(None, unknown)
        raise no_option_of_from_engine(unknown, kind.__name__, is_async=kind.is_async)
    needed = AsyncEngine if kind.is_async else Engine
    if not isinstance(engine, needed):
        from asgi_dbsession.database.optional.mistakes import cure_for

        is_url = isinstance(engine, str | URL)
        cure = f" Write `{kind.__name__}(url)`." if is_url else cure_for(engine)
        raise ConfigurationError(
            f"{kind.__name__}.from_engine takes an {needed.__name__}, not {kind_of(engine)}.{cure}"
        )
    database = kind(engine.url, **options)
    database._engine = engine
    database._owns_engine = False
    borrow(sync_engine_of(engine), database, database._observers)
    return database
