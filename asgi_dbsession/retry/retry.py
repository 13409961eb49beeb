"""Runs a request again after a conflict with another transaction."""

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from importlib import import_module
from random import SystemRandom

import anyio

from asgi_dbsession.errors import ABORTED
from asgi_dbsession.session.failures import watch_all
from asgi_dbsession.types import ASGIApp, Receive, RetryOn, Scope, Send
from asgi_dbsession.unit.attempt import Attempt, RunningAttempt, running_attempt

from .attempt import RequestAttempt
from .replay import Memory, Replay
from .rule import rule_of
from .watched import WatchedAttempt, unwatch_conflicts, watch_conflicts, watch_sessions

_logger = logging.getLogger("asgi_dbsession")

# How long to wait before a retry, in seconds. The pause is a random time of at most `_PAUSE`. This
# limit doubles with each further retry, up to `_LONGEST_PAUSE`.
_PAUSE, _LONGEST_PAUSE = 0.04, 1.0

# Before Python 3.13, a TaskGroup of the application can make the number `Task.cancelling()` too
# high. So the application then runs in a task of its own, whose number is not read. Source:
# https://docs.python.org/3/library/asyncio-task.html#task-groups
_CANCELLING_IS_EXACT = sys.version_info >= (3, 13)

# Load this part of anyio now. Otherwise the first request would load it, and take longer.
import_module("anyio._backends._asyncio")


class Retry:
    """Serves a request, and serves it again from the beginning after a conflict.

    Args:
        app: The ASGI application that serves the request.
        attempts: How often the request may run, including the first time.
        retry_on: The option `retry_on` of `DBSessionMiddleware`: further errors to retry.
    """

    def __init__(self, app: ASGIApp, attempts: int, retry_on: RetryOn) -> None:
        self._app = app
        self._attempts = attempts
        self._counts = rule_of(retry_on)
        self._memory = Memory()
        watch_all(watch_conflicts, unwatch_conflicts)
        watch_sessions()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request. Serve it again after a conflict, at most `attempts` times."""
        body = Replay(receive, self._memory)
        try:
            await self._serve(scope, body, send)
        finally:
            body.close()

    async def _serve(self, scope: Scope, body: Replay, send: Send) -> None:
        context, restore = copy_context(), _keep_contents(scope)
        cancellations = _cancellations()
        for number in range(1, self._attempts):
            watched = WatchedAttempt(Attempt(number, self._attempts - number), self._counts)
            attempt = RequestAttempt(body, watched)
            serve = partial(attempt.serve, self._app, scope, body.from_start(), send)
            try:
                runs_here = number == 1 and _CANCELLING_IS_EXACT
                await (serve() if runs_here else _run_in(context, serve))
                if not attempt.can_retry:
                    # An error response was held back for a retry, which is impossible now (after a
                    # COMMIT, for example). Raise the error, because the client needs an answer.
                    if watched.conflict is not None and attempt.owes_answer:
                        raise watched.conflict
                    return
            finally:
                # Tasks that this attempt started may still be running. If one of them meets a
                # conflict later, this is no reason for a retry. So record no more conflicts.
                watched.make_final()
            # Do not retry a cancelled request. The application may have caught the cancellation and
            # answered with an error response, so no `CancelledError` was raised here.
            if _cancellations() > cancellations:
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
    """Return a random time to wait before the next attempt, in seconds.

    The time is random, so that requests with the same conflict are not retried at the same moment.
    """
    return SystemRandom().uniform(0, min(_PAUSE * 2 ** (number - 1), _LONGEST_PAUSE))


def log_retry(what: str, failed: WatchedAttempt, pause: float) -> None:
    """Log the number of the next attempt, and the error of the failed attempt."""
    number, remaining = failed.attempt.number, failed.attempt.remaining
    _logger.info(
        "Attempt %d of %d of %a begins after a pause of %.0f ms, because of this error: %a",
        number + 1,
        number + remaining,
        what,  # The path in this text comes from the client. `%a` escapes line breaks in it.
        pause * 1000,
        failed.reason,
    )


def _cancellations() -> int:
    """Return how often the current task was cancelled. On trio, return 0."""
    try:
        task = asyncio.current_task()
    # asyncio is not running, so this is a task of trio. Return 0, as if the task was not cancelled.
    # This is safe: on trio, each `await` of a cancelled task raises an exception, and so does the
    # pause before a retry. So a cancelled request never runs again.
    except RuntimeError:
        return 0
    return task.cancelling() if task is not None else 0


async def _run_in(context: Context, function: Callable[[], Awaitable[None]]) -> None:
    """Await `function` in a new task, without the context variables that earlier attempts set."""
    failure: BaseException | None = None

    async def run() -> None:
        nonlocal failure
        try:
            await function()
        except (*ABORTED, asyncio.CancelledError) as error:
            # Store the exception instead of raising it in the task group. The task group would wrap
            # it in an ExceptionGroup, or would swallow a CancelledError that the application itself
            # has raised.
            failure = error

    async with anyio.create_task_group() as group:
        context.run(group.start_soon, run)
    if failure is not None:
        raise failure


def _keep_contents(scope: Scope) -> Callable[[], None]:
    """Return a function that undoes all changes to the ASGI scope.

    The function also undoes changes to lists and dictionaries that are values of the scope. It
    restores these objects in place, because outer middleware has references to the same objects.
    """
    entries = dict(scope)
    kept = [(each, each.copy()) for each in scope.values() if isinstance(each, dict | list)]

    def restore() -> None:
        for each, contents in ((scope, entries), *kept):
            each.clear()
            (each.extend if isinstance(each, list) else each.update)(contents)

    return restore
