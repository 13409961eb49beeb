"""Small functions for SQLAlchemy engines, and one that calls blocking code in a thread."""

from collections.abc import Callable
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from sqlalchemy import Engine, Pool, select
from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")


def sync_engine_of(engine: Engine | AsyncEngine) -> Engine:
    """Return the `Engine` inside an `AsyncEngine`, or the given `Engine` itself."""
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


def select_one(engine: Engine, pool: Pool) -> None:
    """Send a statement to check that the database answers.

    Args:
        engine: The engine.
        pool: The pool that the engine had when the check was requested.
    """
    try:
        with engine.connect() as connection:
            connection.execute(select(1))
    finally:
        # If the engine was disposed meanwhile, it has a new pool. The connection of this check is
        # now in one of the two pools, and nobody will close it later. So dispose both pools.
        if engine.pool is not pool:
            pool.dispose()
            engine.dispose()


async def run_in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread, even if handlers occupy all threads of anyio's pool."""
    # Use a new limiter: handlers that wait for a connection may occupy all threads of anyio's own
    # limiter. Then the COMMIT that frees a connection would have no thread.
    return await to_thread.run_sync(function, *args, limiter=CapacityLimiter(1))
