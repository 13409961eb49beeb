"""How an engine comes to share one connection, and how it gets its own connections back."""

import asyncio
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbsession.database.base import Database
from asgi_dbsession.errors import ConfigurationError, without_secrets

from .dialect import SavepointDialect, with_savepoints
from .isolation import Isolation
from .pool import SharedPool


def share(engine: Engine, isolation: Isolation) -> None:
    """Have all transactions of an engine take turns on one connection that is rolled back.

    Nothing is connected yet. The connection will come from the engine's own pool, with all that
    its events make of a connection.

    Args:
        engine: Changed in place, as others hold it too.
        isolation: Of the `rolled_back` block.

    Raises:
        ConfigurationError: The engine shares one connection already.
    """
    name = without_secrets(engine.url)
    if isinstance(engine.pool, SharedPool):
        raise ConfigurationError(
            f"{name} is inside of `rolled_back` already: use it once for each test."
        )
    dialect = engine.dialect
    if not isinstance(dialect, SavepointDialect):  # else work has outlived an earlier test
        dialect.__class__ = with_savepoints(type(dialect))
    engine.pool = SharedPool(engine.pool, dialect, name, isolation)


def unshare(engine: Engine) -> None:
    """Roll everything back, and give the engine its own connections back."""
    pool, dialect = engine.pool, engine.dialect
    if isinstance(pool, SharedPool):
        try:
            pool.roll_back()
        finally:
            engine.pool = pool.source
            if pool.checkedout() == 0:  # else what is still out must go on to be refused
                dialect.__class__ = type(dialect).__bases__[1]


def home_of(engine: Engine) -> asyncio.AbstractEventLoop | None:
    """The event loop that the shared connection belongs to, if it belongs to one."""
    return engine.pool.loop if isinstance(engine.pool, SharedPool) else None


def engines_of(database: Database[Any, Any]) -> Iterator[Engine]:
    """The engines that the sessions of a database are known to use: its own, and `binds`.

    What a session class chooses in `get_bind` is known only when a session has used it.
    """
    if database._engine is not None:
        yield root_of(database._sync_engine(database._engine))
    for bind in (database._session_options.get("binds") or {}).values():
        engine = bind.sync_engine if isinstance(bind, AsyncEngine) else bind
        if isinstance(engine, Engine):
            yield root_of(engine)


def root_of(engine: Engine) -> Engine:
    """The engine that owns the pool; `engine` may be a copy of it with other options."""
    proxied: Any = engine
    while isinstance(proxied, OptionEngine):
        proxied = proxied._proxied
    root: Engine = proxied
    return root
