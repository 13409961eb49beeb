"""Opens the connections of an async engine in a context of their own.

The sockets of asyncio keep the context in which they were opened. A connection that a request opens
lives as long as the pool, and would keep all context variables of the request.
"""

import asyncio
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_dbsession.session.completion import run_to_completion


def connect_outside(engine: Engine) -> None:
    """Make an engine open its connections outside of the context of any request.

    The driver is wrapped, and not the event `do_connect`: so all listeners of the application are
    called as before, and `async_creator` connects like this too.
    """
    driver: Any = engine.dialect.dbapi
    if engine.dialect.is_async and "connect" not in vars(driver):
        driver.connect = partial(_connect, engine.dialect, driver.connect)


def connect_as_before(engine: Engine) -> None:
    """Undo `connect_outside`."""
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
        # The connection was ready just when the request was cancelled: nobody else can close it.
        if task.done() and not task.cancelled() and task.exception() is None:
            await run_to_completion(greenlet_spawn(dialect.do_terminate, task.result()))
        raise
    finally:
        del task  # an error would refer to itself: error, traceback, frame, task, error
