"""Opens the connections of an async engine in an empty context.

A socket of asyncio keeps the context in which it was opened. A connection stays in the pool after
the request that opened it. Without an empty context, the connection would keep all context
variables of the request in memory.
"""

import asyncio
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_dbsession.session.completion import run_to_completion

# The drivers whose connections keep the context. All other async drivers keep no context. Also,
# aiosqlite would leave its file open if the task that this module starts was cancelled.
_KEEPERS = ("aiomysql", "asyncmy", "asyncpg")


def connect_outside(engine: Engine) -> None:
    """Make an engine open its connections outside of the context of any request.

    This function wraps the driver's `connect`, and does not use SQLAlchemy's event `do_connect`. So
    the application's listeners for `do_connect` are called as before, and an `async_creator`
    connects in the empty context too.
    """
    driver: Any = engine.dialect.dbapi
    if engine.dialect.driver in _KEEPERS and "connect" not in vars(driver):
        driver.connect = partial(_connect, engine.dialect, driver.connect)


def connect_as_before(engine: Engine) -> None:
    """Remove the wrapper that `connect_outside` added to the driver."""
    driver: Any = engine.dialect.dbapi
    wrapper = vars(driver).get("connect")
    if isinstance(wrapper, partial) and wrapper.func is _connect:
        del driver.connect


def _connect(dialect: Any, connect: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return await_only(_connect_in_task(dialect, partial(connect, *args, **options)))


async def _connect_in_task(dialect: Any, connect: Callable[[], Any]) -> Any:
    loop = asyncio.get_running_loop()
    task = loop.create_task(greenlet_spawn(connect), context=Context())
    try:
        return await task
    except asyncio.CancelledError:
        # The request was cancelled just when the new connection was ready. No other code has a
        # reference to the connection, so close the connection now.
        if task.done() and not task.cancelled() and task.exception() is None:
            await run_to_completion(greenlet_spawn(dialect.do_terminate, task.result()))
        raise
    finally:
        # Delete the variable. Otherwise an error would refer to the task, and the task to the
        # error: only the garbage collector could free such a circle.
        del task
