"""Replaces the pool of an engine by a `SharedPool` during a test, and restores it afterwards."""

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
        engine: The engine. It is changed in place, because other code refers to the same object.
        isolation: The state of the `rolled_back` block.

    Raises:
        ConfigurationError: The engine has a `SharedPool` already.
    """
    name = without_secrets(engine.url)
    if isinstance(engine.pool, SharedPool):
        raise ConfigurationError(
            f"{name} is inside of `rolled_back` already: use it once for each test."
        )
    dialect = engine.dialect
    # If work of an earlier test still uses a connection, `unshare` has not restored the class of
    # the dialect. Do not derive a second class then: `unshare` would remove only one of the two.
    if not isinstance(dialect, SavepointDialect):
        dialect.__class__ = with_savepoints(type(dialect))
    engine.pool = SharedPool(engine.pool, dialect, name, isolation)


def unshare(engine: Engine) -> None:
    """At the end of a test, roll back its work, and give the engine its own pool again.

    If the engine has no `SharedPool`, do nothing.
    """
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
    """Return the event loop of the engine's shared connection; None without such a connection."""
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
