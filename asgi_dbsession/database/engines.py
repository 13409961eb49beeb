"""The operations on an engine that differ between async and sync engines."""

from collections.abc import Callable
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")


def sync_engine_of(engine: Engine | AsyncEngine) -> Engine:
    """Return the sync engine, which has the pool, the dialect and the events."""
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


async def select_one(engine: Engine | AsyncEngine) -> None:
    """Send a statement to check that the database answers."""
    if isinstance(engine, Engine):
        await run_in_thread(select_one_here, engine)
        return
    pool = engine.pool
    async with engine.connect() as connection:
        await connection.execute(select(1))
        # If the engine was disposed during this statement, its new pool does not know this
        # connection, and would not close it later. So close the connection here.
        if engine.pool is not pool:
            await connection.invalidate()


def select_one_here(engine: Engine) -> None:
    """Send a statement on the calling thread, to check that the database answers."""
    pool = engine.pool
    with engine.connect() as connection:
        connection.execute(select(1))
        # As above: `dispose()` has replaced the pool, and the new pool does not know this
        # connection. Detach the connection, so that the end of the `with` block closes it.
        if engine.pool is not pool:
            connection.detach()


async def dispose(engine: Engine | AsyncEngine) -> None:
    """Close all connections of the engine's pool."""
    if isinstance(engine, AsyncEngine):
        await engine.dispose()
    else:
        await run_in_thread(engine.dispose)


async def run_in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread, even if handlers occupy all threads of the common pool."""
    # Each call has its own limit for threads. The limit of anyio is shared with handlers. Handlers
    # that wait for a database connection could use it up, and then the COMMIT that frees a
    # connection would have no thread.
    return await to_thread.run_sync(function, *args, limiter=CapacityLimiter(1))
