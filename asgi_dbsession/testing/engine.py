"""Lets an engine share one connection during a test, and restores its pool afterwards."""

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
    """Let all transactions of an engine use one shared connection, one after the other.

    The engine does not connect yet. The connection comes from the engine's own pool, so the pool's
    event listeners are called.

    Args:
        engine: The engine to change in place, because other code refers to the same object.
        isolation: The state of the `rolled_back` block.

    Raises:
        ConfigurationError: The engine shares one connection already.
    """
    name = without_secrets(engine.url)
    if isinstance(engine.pool, SharedPool):
        raise ConfigurationError(
            f"{name} is inside of `rolled_back` already: use it once for each test."
        )
    dialect = engine.dialect
    # The dialect is a `SavepointDialect` already if work of an earlier test still uses a
    # connection. A second derived class would stay after the test, because `unshare` removes only
    # one class.
    if not isinstance(dialect, SavepointDialect):
        dialect.__class__ = with_savepoints(type(dialect))
    engine.pool = SharedPool(engine.pool, dialect, name, isolation)


def unshare(engine: Engine) -> None:
    """Roll back the work of the test, and restore the engine's own pool."""
    pool, dialect = engine.pool, engine.dialect
    if isinstance(pool, SharedPool):
        try:
            pool.roll_back()
        finally:
            engine.pool = pool.source
            # Keep the class `SavepointDialect` while connections are checked out, so that
            # statements after the end of the test raise errors.
            if pool.checkedout() == 0:
                dialect.__class__ = type(dialect).__bases__[1]


def home_of(engine: Engine) -> asyncio.AbstractEventLoop | None:
    """Return the event loop of the shared connection; None for a blocking connection."""
    return engine.pool.loop if isinstance(engine.pool, SharedPool) else None


def engines_of(database: Database[Any, Any]) -> Iterator[Engine]:
    """Iterate over the engines of a database: its own engine, and the engines in `binds`.

    An engine that a session class chooses in `get_bind` is known only after a session has used it.
    """
    if database._engine is not None:
        yield root_of(database._sync_engine(database._engine))
    for bind in (database._session_options.get("binds") or {}).values():
        engine = bind.sync_engine if isinstance(bind, AsyncEngine) else bind
        if isinstance(engine, Engine):
            yield root_of(engine)


def root_of(engine: Engine) -> Engine:
    """Return the engine that owns the pool: `engine`, or the engine of which it is a copy."""
    proxied: Any = engine
    while isinstance(proxied, OptionEngine):
        proxied = proxied._proxied
    root: Engine = proxied
    return root
