"""Runs something to its end although its caller is cancelled."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


async def run_to_completion(work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, and never return before it is done.

    On asyncio it gets a task of its own. On trio, which cancels through scopes alone, a shielded
    scope is enough; a cancellation that came meanwhile is raised where the caller next waits.

    Returns:
        What `work` returned.

    Raises:
        asyncio.CancelledError: The caller was cancelled meanwhile, once or several times. It is
            raised after `work` has ended, with the error of `work`, if any, as its cause.
        Exception: Whatever `work` raised.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # trio, where nothing but a scope can cancel
        with anyio.CancelScope(shield=True):
            return await work
        raise  # never: a shielded scope swallows nothing
    finished = loop.create_future()  # what a cancellation of the caller hits instead of the work

    async def work_to_the_end() -> T:
        try:
            return await work
        finally:
            if not finished.done():
                finished.set_result(None)

    task = _start(loop, work_to_the_end())
    try:
        await finished
    except asyncio.CancelledError as cancelled:
        # The future stops task.cancel(); only a scope stops anyio, which would otherwise cancel
        # this wait again at every turn of the loop.
        with anyio.CancelScope(shield=True):
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError:
                    continue
        if not task.cancelled() and (error := task.exception()) is not None:
            raise cancelled from error
        raise
    return task.result()


async def call_here(function: Callable[..., T], *args: Any) -> T:
    """Call a function that may block on the thread that asks."""
    return function(*args)


def complete_here(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that calls its functions with `call_here`, and so never waits.

    Returns:
        What it returned.

    Raises:
        Exception: Whatever it raised.
    """
    try:
        work.send(None)
    except StopIteration as finished:
        result: T = finished.value
        return result
    raise RuntimeError(f"{work!r} waits")  # never: there is no event loop to wait for


def _start(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    # Begun at once where Python can: that saves a turn of the loop, and 2 % of a request that
    # writes a row. A loop whose tasks are made by a factory keeps to it.
    if sys.version_info >= (3, 12) and loop.get_task_factory() is None:
        return asyncio.Task(work, loop=loop, eager_start=True)
    return loop.create_task(work)
