"""Opens and closes the connections of an async engine outside of a request.

A socket of asyncio keeps a reference to the context (`contextvars`) in which it was opened. The
connection stays in the pool after the request. Without this module, the connection would keep all
context variables of that request in memory.
"""

import asyncio
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from asgi_dbsession.session.completion import run_before_cancellation, run_to_completion

# Open the connections of these drivers in a task of their own. Otherwise, psycopg would leave a
# connection open if the request is cancelled while the connection is opened. The others would keep
# the context variables of the request in memory. Do not add aiosqlite: after a cancellation of its
# own task, the database file would stay open.
_IN_TASK = ("aiomysql", "asyncmy", "asyncpg", "psycopg")


def connect_in_tasks(engine: Engine) -> None:
    """Let an engine open and close its connections in tasks of their own.

    In the task of a request, a connection would keep all context variables of the request in memory
    as long as the connection is open. And a pool closes a connection that is lost or too old before
    it opens another one: if the task of the request is cancelled in between, the pool could lose a
    place for a connection.

    This function replaces the driver's `connect`, and does not use SQLAlchemy's event `do_connect`.
    So the application's own listeners for `do_connect` are called as before. An `async_creator` of
    the application connects in the empty context too.
    """
    dialect: Any = engine.dialect
    if dialect.driver in _IN_TASK and "connect" not in vars(dialect.dbapi):
        dialect.dbapi.connect = partial(connect_in_task, dialect, dialect.dbapi.connect)
    if dialect.is_async and "do_terminate" not in vars(dialect):
        dialect.do_terminate = partial(close_in_task, dialect.do_terminate)


def close_in_task(terminate: Callable[[Any], object], connection: Any) -> None:
    """Close a connection completely, even if the calling task is cancelled meanwhile.

    The calling task gets its `CancelledError` only at its next `await`, after the close. So the
    pool can first record that the place of this connection is free.
    """
    # The garbage collector closes a connection outside of a greenlet, where nothing can be awaited.
    if in_greenlet():
        await_only(run_before_cancellation(greenlet_spawn(terminate, connection)))
    else:
        terminate(connection)


def connect_in_task(dialect: Any, connect: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call the driver's `connect` in a new task, which has an empty `contextvars` context.

    In the task of a request, the connection would keep the context variables of the request in
    memory.
    """
    return await_only(_connect_in_task(dialect, partial(connect, *args, **options)))


async def _connect_in_task(dialect: Any, connect: Callable[[], Any]) -> Any:
    task = asyncio.create_task(greenlet_spawn(connect), context=Context())
    try:
        return await task
    except asyncio.CancelledError as cancelled:
        # The request was cancelled just after the new connection was opened. No other code has a
        # reference to this connection, so close it here.
        if task.done() and not task.cancelled() and task.exception() is None:
            await run_to_completion(greenlet_spawn(dialect.do_terminate, task.result()))
        # Remove the traceback, which refers to a connection that psycopg has not opened completely.
        # Otherwise only the garbage collector would close this connection.
        raise cancelled.with_traceback(None) from None
    finally:
        # Break the reference cycle of the task, its error and this function. Otherwise only the
        # garbage collector could free them.
        del task
