"""Runs a request again that lost a race with another one in the database."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial

import anyio

from asgi_dbsession.errors import UNWOUND
from asgi_dbsession.types import ASGIApp, Receive, Scope, Send

from .attempt import Attempt
from .replay import Replay

# The longest pause before the second run, in seconds; it doubles from run to run, up to the other.
_PAUSE, _LONGEST_PAUSE = 0.04, 1.0


async def serve_until_won(
    serve: ASGIApp, attempts: int, scope: Scope, receive: Receive, send: Send
) -> None:
    """Serve a request up to `attempts` times, each from the top as if it were the first."""
    context, restore, body = copy_context(), _keep_contents(scope), Replay(receive)
    for number in range(1, attempts):
        attempt = Attempt(body)
        serve_once = partial(attempt.serve, serve, scope, send)
        await (serve_once() if number == 1 else _run_in(context, serve_once))
        if not attempt.is_futile:
            # Withheld, and then something was committed, or more of the body came than is kept.
            if attempt.lost is not None and attempt.owes_answer:
                raise attempt.lost
            return
        if _is_cancelled():  # and its application took that for an error
            raise asyncio.CancelledError
        # The others that lost the same race try again too: not all at once.
        pause = random.uniform(0, min(_PAUSE * 2 ** (number - 1), _LONGEST_PAUSE))  # noqa: S311
        await anyio.sleep(pause)
        restore()
    await _run_in(context, partial(serve, scope, body.from_start(), send))


def _is_cancelled() -> bool:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # trio, whose cancelled scopes raise again at every wait
        return False
    return task is not None and task.cancelling() > 0


async def _run_in(context: Context, function: Callable[[], Awaitable[None]]) -> None:
    """Await it with the context variables as they were, whatever the attempt before set."""
    failure: BaseException | None = None

    async def run() -> None:
        nonlocal failure
        try:
            await function()
        except (*UNWOUND, asyncio.CancelledError) as error:
            # Out of the group it would come as a group; or not at all, if the application itself
            # let go of something that was cancelled.
            failure = error

    async with anyio.create_task_group() as group:
        context.run(group.start_soon, run)
    if failure is not None:
        raise failure


def _keep_contents(scope: Scope) -> Callable[[], None]:
    """What puts a scope back as it is now, its lists and dictionaries (`state`) included.

    In place: middleware further out holds the same ones.
    """
    entries = dict(scope)
    kept = [(each, each.copy()) for each in scope.values() if isinstance(each, dict | list)]

    def restore() -> None:
        for each, contents in ((scope, entries), *kept):
            each.clear()
            (each.extend if isinstance(each, list) else each.update)(contents)

    return restore
