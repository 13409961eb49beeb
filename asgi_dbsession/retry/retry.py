"""Runs a request again after a conflict with another transaction."""

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
from .conflicts import WatchedAttempt, unwatch_conflicts, watch_conflicts, watch_sessions
from .replay import Replay, Room
from .rule import rule_of

_logger = logging.getLogger("asgi_dbsession")

# Two pauses in seconds: the longest pause before the second attempt, which doubles for each later
# attempt, and the limit for the doubled pause.
_PAUSE, _LONGEST_PAUSE = 0.04, 1.0


class Retry:
    """Serves a request, and serves it again from the start after a conflict.

    Args:
        app: The application that serves the request.
        attempts: How often the request may run, including the first time.
        retry_on: The option `retry_on` of `DBSessionMiddleware`: more errors after which to retry.
    """

    def __init__(self, app: ASGIApp, attempts: int, retry_on: RetryOn) -> None:
        self._app = app
        self._attempts = attempts
        self._counts = rule_of(retry_on)
        self._room = Room()
        watch_all(watch_conflicts, unwatch_conflicts)
        watch_sessions()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request, in one or several attempts."""
        body = Replay(receive, self._room)
        try:
            await self._serve(scope, body, send)
        finally:
            body.close()

    async def _serve(self, scope: Scope, body: Replay, send: Send) -> None:
        context, restore = copy_context(), _keep_contents(scope)
        for number in range(1, self._attempts):
            watched = WatchedAttempt(Attempt(number, self._attempts - number), self._counts)
            attempt = RequestAttempt(body, watched)
            serve = partial(attempt.serve, self._app, scope, body.from_start(), send)
            try:
                await (serve() if number == 1 else _run_in(context, serve))
                if not attempt.can_retry:
                    # The response with the error was not sent, because a retry seemed possible.
                    # Then a COMMIT or a large body made the retry impossible, so raise the error.
                    if watched.conflict is not None and attempt.owes_answer:
                        raise watched.conflict
                    return
            finally:
                # A task of this attempt may still be running. It must not record a conflict in the
                # ended attempt.
                watched.make_final()
            # The request was cancelled, and the application answered the cancellation with an
            # error. Do not retry a cancelled request.
            if _is_cancelled():
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
    """Return a random pause before the next attempt, in seconds.

    The pause is random, so that requests with the same conflict do not try again at the same time.
    """
    return SystemRandom().uniform(0, min(_PAUSE * 2 ** (number - 1), _LONGEST_PAUSE))


def log_retry(what: str, failed: WatchedAttempt, pause: float) -> None:
    """Log the number of the next attempt, and the error that caused it."""
    number, remaining = failed.attempt.number, failed.attempt.remaining
    _logger.info(
        "Attempt %d of %d of %a begins after a pause of %.0f ms, because of this error: %a",
        number + 1,
        # `%a` escapes line breaks in the path, which the client chose
        number + remaining,
        what,
        pause * 1000,
        failed.reason,
    )


def _is_cancelled() -> bool:
    try:
        task = asyncio.current_task()
    # The caller runs on trio. There a cancelled scope raises at the next await, so no check is
    # needed.
    except RuntimeError:
        return False
    return task is not None and task.cancelling() > 0


async def _run_in(context: Context, function: Callable[[], Awaitable[None]]) -> None:
    """Await the function in `context`, without the context variables that earlier attempts set."""
    failure: BaseException | None = None

    async def run() -> None:
        nonlocal failure
        try:
            await function()
        except (*ABORTED, asyncio.CancelledError) as error:
            # Do not raise the exception in the task group. The group would wrap the exception in an
            # ExceptionGroup, or suppress a CancelledError that the application raised itself.
            failure = error

    async with anyio.create_task_group() as group:
        context.run(group.start_soon, run)
    if failure is not None:
        raise failure


def _keep_contents(scope: Scope) -> Callable[[], None]:
    """Return a function that undoes changes of the scope and of its lists and dictionaries.

    The function changes the objects in place, because outer middleware uses the same objects.
    """
    entries = dict(scope)
    kept = [(each, each.copy()) for each in scope.values() if isinstance(each, dict | list)]

    def restore() -> None:
        for each, contents in ((scope, entries), *kept):
            each.clear()
            (each.extend if isinstance(each, list) else each.update)(contents)

    return restore
