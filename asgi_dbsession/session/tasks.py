"""Functions that find the running task, and tell if a task has ended, failed, or waits."""

import asyncio
import inspect
import sys
from typing import Any


def current_task() -> object:
    """Return the running task of asyncio or trio; None in a worker thread."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        trio: Any = sys.modules.get("trio")
    try:
        return trio.lowlevel.current_task() if trio is not None else None
    except RuntimeError:
        return None


def is_on_event_loop() -> bool:
    """Return True if an event loop calls this code, in a task or in a callback."""
    return asyncio._get_running_loop() is not None or current_task() is not None


def has_ended(task: Any) -> bool:
    """Return True if a task (of asyncio or trio) has returned, failed, or was cancelled."""
    if isinstance(task, asyncio.Future):
        return task.done()
    return inspect.getcoroutinestate(task.coro) == inspect.CORO_CLOSED


def has_failed(task: Any) -> bool:
    """Return True if a task that has ended was cancelled or raised an exception.

    For a trio task the result is always False, because trio does not store how a task ended. In
    trio, the task that opened the nursery gets the exception.
    """
    if not isinstance(task, asyncio.Future):
        return False
    return task.cancelled() or task.exception() is not None


def is_waiting_for(parent: object, child: object) -> bool:
    """Return True if the task `parent` waits for the asyncio task `child`, and does nothing else.

    Before Python 3.12, `asyncio.wait_for` runs the given coroutine in a child task. The parent task
    waits for a future, and a callback of the child task sets the result of this future.
    """
    waiter: object = getattr(parent, "_fut_waiter", None)
    if waiter is None:
        return False
    if waiter is child:
        return True
    callbacks: Any = getattr(child, "_callbacks", None) or ()
    return any(waiter in getattr(callback, "args", ()) for callback, _context in callbacks)
