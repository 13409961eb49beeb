"""Functions that return if a task has ended, if the task failed, and if it waits for a child."""

import asyncio
import inspect
from typing import Any


def has_ended(task: Any) -> bool:
    """Return True if the task of asyncio or trio has returned, raised, or was cancelled."""
    if isinstance(task, asyncio.Future):
        return task.done()
    return inspect.getcoroutinestate(task.coro) == inspect.CORO_CLOSED


def has_failed(task: Any) -> bool:
    """Return True if an ended task was cancelled or raised an exception.

    For a trio task the result is always False, because trio does not store how a task ended. Trio
    raises the exception of the task again in the task that opened the nursery.
    """
    if not isinstance(task, asyncio.Future):
        return False
    return task.cancelled() or task.exception() is not None


def is_waiting_for(parent: object, child: object) -> bool:
    """Return True if the task `parent` only waits until the asyncio task `child` has ended.

    Before Python 3.12, `asyncio.wait_for` runs the given coroutine in a child task. The parent then
    waits for a future whose result is set by a callback of the child.
    """
    waiter: object = getattr(parent, "_fut_waiter", None)
    if waiter is None:
        return False
    if waiter is child:
        return True
    callbacks: Any = getattr(child, "_callbacks", None) or ()
    return any(waiter in getattr(callback, "args", ()) for callback, _context in callbacks)
