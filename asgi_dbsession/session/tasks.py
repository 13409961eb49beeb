"""How other tasks ended, and what they wait for."""

import asyncio
import inspect
from typing import Any


def has_ended(task: Any) -> bool:
    """Whether a task of asyncio or trio has returned or raised."""
    if isinstance(task, asyncio.Future):
        return task.done()
    return inspect.getcoroutinestate(task.coro) == inspect.CORO_CLOSED


def has_failed(task: Any) -> bool:
    """Whether a task that has ended was cancelled or raised an exception.

    False on trio, where a task cannot be asked: its exception is raised in the task that opened the
    nursery, and whoever catches it there answers for it.
    """
    if not isinstance(task, asyncio.Future):
        return False
    return task.cancelled() or task.exception() is not None


def is_waiting_for(parent: object, child: object) -> bool:
    """Whether `parent` does nothing but wait until the asyncio task `child` has ended.

    Before Python 3.12, `asyncio.wait_for` runs what it is given in a child task. Then the parent
    waits for a future that a callback of the child sets.
    """
    waiter: object = getattr(parent, "_fut_waiter", None)
    if waiter is None:
        return False
    if waiter is child:
        return True
    callbacks: Any = getattr(child, "_callbacks", None) or ()
    return any(waiter in getattr(callback, "args", ()) for callback, _context in callbacks)
