"""Runs a request again after a conflict with another one in the database."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from random import SystemRandom

import anyio

from asgi_dbsession.errors import ABORTED
from asgi_dbsession.session.failures import watch_all
from asgi_dbsession.types import ASGIApp, Receive, Scope, Send
from asgi_dbsession.unit.attempt import Attempt, RunningAttempt, running_attempt
from asgi_dbsession.unit.retry_on import RetryOn

from .attempt import RequestAttempt
from .conflicts import WatchedAttempt, unwatch_conflicts, watch_conflicts
from .replay import Replay
from .rule import rule_of

_logger = logging.getLogger("asgi_dbsession")

# The longest pause before the second run, in seconds; it doubles from run to run, up to the other.
_PAUSE, _LONGEST_PAUSE = 0.04, 1.0


class Retry:
    """Serves a request several times if need be, each time from the start.

    Args:
        app: What serves the request.
        attempts: How often it may run.
        retry_on: What else counts as a conflict.
    """

    def __init__(self, app: ASGIApp, attempts: int, retry_on: RetryOn) -> None:
        self._app = app
        self._attempts = attempts
        self._counts = rule_of(retry_on)
        watch_all(watch_conflicts, unwatch_conflicts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        context, restore, body = copy_context(), _keep_contents(scope), Replay(receive)
        for number in range(1, self._attempts):
            watched = WatchedAttempt(Attempt(number, self._attempts - number), self._counts)
            attempt = RequestAttempt(body, watched)
            serve = partial(attempt.serve, self._app, scope, receive, send)
            await (serve() if number == 1 else _run_in(context, serve))
            if not attempt.can_retry:
                # Withheld, and then something was committed, or the body became too long to keep.
                if watched.conflict is not None and attempt.owes_answer:
                    raise watched.conflict
                return
            if _is_cancelled():  # and its application took that for an error
                raise asyncio.CancelledError
            pause = pause_after(number)
            await anyio.sleep(pause)
            restore()
            what = f"{scope.get('method')} {scope.get('path')}"
            log_retry(what, watched, pause)
        last = RunningAttempt(Attempt(self._attempts))
        context.run(running_attempt.set, last)
        await _run_in(context, partial(self._app, scope, body.from_start(last=True), send))


def pause_after(number: int) -> float:
    """Seconds to wait after the attempt of that number.

    Others that had the same conflict try again too: not all at once.
    """
    return SystemRandom().uniform(0, min(_PAUSE * 2 ** (number - 1), _LONGEST_PAUSE))


def log_retry(what: str, failed: WatchedAttempt, pause: float) -> None:
    """Write down that an attempt follows, and why."""
    number, remaining = failed.attempt.number, failed.attempt.remaining
    _logger.info(
        "Attempt %d of %d of %a begins after a pause of %.0f ms, because of a conflict: %a",
        number + 1,
        number + remaining,  # escaped: a client chose the path
        what,
        pause * 1000,
        failed.reason,
    )


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
        except (*ABORTED, asyncio.CancelledError) as error:
            # Out of the group it would come as a group; or not at all, if the application itself
            # raised a cancellation.
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
