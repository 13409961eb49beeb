"""Calls blocking functions with an engine: in a greenlet (async engine) or a thread (sync)."""

from collections.abc import Callable
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

T = TypeVar("T")


def sync_engine_of(engine: Engine | AsyncEngine) -> Engine:
    """Return the `Engine` inside an `AsyncEngine`, or the given `Engine` itself."""
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


async def call_with(engine: Engine | AsyncEngine, function: Callable[[Engine], T]) -> T:
    """Call a blocking function with the sync engine, without blocking the event loop."""
    if isinstance(engine, AsyncEngine):
        return await greenlet_spawn(function, engine.sync_engine)
    return await run_in_thread(function, engine)


def select_one(engine: Engine) -> None:
    """Send a statement to check that the database answers."""
    pool = engine.pool
    with engine.connect() as connection:
        connection.execute(select(1))
        # If the engine was disposed during this statement, its new pool does not know this
        # connection, and would not close it later. So close the connection here.
        if engine.pool is not pool:
            connection.invalidate()


async def run_in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread, even if handlers occupy all threads of anyio's pool."""
    # anyio limits the number of its worker threads. Handlers that wait for a database connection
    # may occupy all of these threads. Then the COMMIT that frees a connection would have no thread.
    # So give each call of this function a limiter of its own.
    return await to_thread.run_sync(function, *args, limiter=CapacityLimiter(1))
