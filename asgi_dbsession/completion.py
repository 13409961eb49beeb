"""Runs something to its end although its caller is cancelled."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


async def run_to_completion(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` in a task of its own, and never return before it is done.

    Returns:
        What `work` returned.

    Raises:
        asyncio.CancelledError: The caller was cancelled meanwhile, once or several times. It is
            raised after `work` has ended, with the error of `work`, if any, as its cause.
        Exception: Whatever `work` raised.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError as cancelled:
        # The shield stops task.cancel(); only a scope stops anyio, which would otherwise cancel
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
