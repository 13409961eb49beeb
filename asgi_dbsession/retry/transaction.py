"""Calls a function in a `begin()` block, and calls it again after a conflict."""

import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from inspect import isawaitable
from typing import Any, TypeVar

import anyio
from typing_extensions import TypeVarTuple, Unpack

from asgi_dbsession.database.arguments import check_number
from asgi_dbsession.errors import ConfigurationError, kind_of, name_of
from asgi_dbsession.session.failures import watch_all
from asgi_dbsession.types import RetryOn
from asgi_dbsession.unit.attempt import Attempt, running_attempt

from .retry import log_retry, pause_after
from .rule import rule_of
from .watched import WatchedAttempt, unwatch_conflicts, watch_conflicts

T = TypeVar("T")
Args = TypeVarTuple("Args")


async def run_transaction(
    database: Any,
    function: Callable[[Unpack[Args]], Awaitable[T]],
    args: tuple[*Args],
    attempts: int,
    retry_on: RetryOn,
) -> T:
    """Await `function(*args)` in a `database.begin()` block, and again after a conflict.

    A conflict is an error such as a deadlock, or an error that `retry_on` selects. The function is
    called at most `attempts` times.
    """
    _check(function)
    for attempt in _attempts(attempts, retry_on):
        with _retrying(attempt):
            async with database.begin():
                result = function(*args)
                if not isawaitable(result):
                    raise _refusal(function, "a coroutine function", "`async def`")
                return await result
        await anyio.sleep(_pause_and_log(function, attempt))
    # This line never runs, because the last attempt of the loop returns or raises.
    raise AssertionError


def run_transaction_blocking(
    database: Any,
    function: Callable[[Unpack[Args]], T],
    args: tuple[*Args],
    attempts: int,
    retry_on: RetryOn,
) -> T:
    """Call `function(*args)` in a `database.begin()` block, and again after a conflict.

    A conflict is an error such as a deadlock, or an error that `retry_on` selects. The function is
    called at most `attempts` times.
    """
    _check(function)
    for attempt in _attempts(attempts, retry_on):
        with _retrying(attempt):
            with database.begin():
                result = function(*args)
                if isawaitable(result):
                    _discard(result)
                    raise _refusal(function, "a plain function", "`def`")
            return result
        time.sleep(_pause_and_log(function, attempt))
    # This line never runs, because the last attempt of the loop returns or raises.
    raise AssertionError


def _check(function: object) -> None:
    if not callable(function):
        _discard(function)
        raise ConfigurationError(
            f"run_transaction takes a function, and was given {kind_of(function)}. If you called "
            "the function yourself, write `run_transaction(function, argument)`."
        )


def _discard(result: object) -> None:
    # Close a coroutine, so that Python does not warn about a coroutine that was never awaited.
    if isinstance(result, Coroutine):
        result.close()


def _attempts(attempts: int, retry_on: RetryOn) -> Iterator[WatchedAttempt]:
    check_number("attempts", attempts)
    counts = rule_of(retry_on)
    watch_all(watch_conflicts, unwatch_conflicts)
    for number in range(1, attempts + 1):
        yield WatchedAttempt(Attempt(number, attempts - number), counts)


@contextmanager
def _retrying(attempt: WatchedAttempt) -> Iterator[None]:
    """Suppress the exception of a `with` block if `run_transaction` will run the block again."""
    token = running_attempt.set(attempt)
    try:
        yield
    except Exception as error:
        attempt.record_error(error)
        if attempt.attempt.remaining == 0 or not attempt.can_retry:
            raise
    finally:
        running_attempt.reset(token)
        attempt.is_final = True


def _pause_and_log(function: object, attempt: WatchedAttempt) -> float:
    pause = pause_after(attempt.attempt.number)
    log_retry(name_of(function), attempt, pause)
    return pause


def _refusal(function: object, kind: str, keyword: str) -> ConfigurationError:
    return ConfigurationError(
        f"run_transaction of this database takes {kind}, and {name_of(function)} is not one. Write "
        f"it with {keyword}."
    )
