"""Turns the option `retry_on` into a function that decides if an error is retried."""

from collections.abc import Callable
from typing import Any, TypeAlias

from asgi_dbsession.asgi.rules import checked
from asgi_dbsession.database.arguments import check_function
from asgi_dbsession.errors import ConfigurationError, kind_of
from asgi_dbsession.types import RetryOn

Rule: TypeAlias = Callable[[BaseException], bool]


def rule_of(retry_on: RetryOn) -> Rule:
    """Turn the option `retry_on` into a function that gets an exception and returns True to retry.

    Without this option, only deadlocks and similar errors of the database lead to a retry.

    Raises:
        ConfigurationError: `retry_on` is neither an exception class, nor a tuple of exception
            classes, nor a plain function, nor None.
    """
    if retry_on is None:
        return lambda _: False
    classes: Any = retry_on if isinstance(retry_on, tuple) else (retry_on,)
    if all(isinstance(each, type) and issubclass(each, Exception) for each in classes):
        return lambda error: isinstance(error, classes)
    rule: Any = retry_on
    if isinstance(rule, type) or not callable(rule):
        raise ConfigurationError(
            "retry_on takes a class of exceptions, a tuple of such classes, or a plain function, "
            f"not {kind_of(rule)}."
        )
    check_function("retry_on", rule, "error")
    return lambda error: isinstance(error, Exception) and checked(rule(error), "retry_on")


def check_retry_on(retry_on: RetryOn, attempts: int) -> None:
    """Check the option `retry_on` of the middleware.

    Raises:
        ConfigurationError: The value of the option is wrong. Or `attempts` is 1, so that no request
            is ever retried.
    """
    rule_of(retry_on)
    if attempts == 1:
        raise ConfigurationError(
            "retry_on has no effect, because a request runs only once. Set `attempts` to 2 or more."
        )
