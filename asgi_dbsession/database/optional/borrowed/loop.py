"""Lets one event loop after the other use an async engine of the application."""

from asyncio import AbstractEventLoop
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool

from asgi_dbsession.errors import DatabaseNotRunning


def take_to_loop(database: Any, engine: AsyncEngine, loop: AbstractEventLoop) -> None:
    """From now on, let the current event loop use an engine that the application has made.

    Raises:
        DatabaseNotRunning: Another event loop uses the engine, and its connections.
    """
    if database._loop is not None and not isinstance(engine.pool, NullPool):
        if not database._loop.is_closed():
            raise DatabaseNotRunning(database, other_loop=True)
        # The connections in the pool belong to an event loop that is closed, so nobody can close
        # the connections any more. Give the engine a new pool, and leave the connections open.
        engine.sync_engine.dispose(close=False)
    database._loop = loop
