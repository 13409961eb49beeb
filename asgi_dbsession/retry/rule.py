"""Makes a function from the option `retry_on`, which tells if an error is retried."""

from collections.abc import Callable
from typing import TypeAlias

from asgi_dbsession.asgi.rules import checked
from asgi_dbsession.unit.retry_on import RetryOn

Rule: TypeAlias = Callable[[BaseException], bool]


def rule_of(retry_on: RetryOn) -> Rule:
    """Return a function that tells if an error is retried in the same way as a conflict."""
    if retry_on is None:
        return lambda _: False
    if isinstance(retry_on, type | tuple):
        classes = retry_on
        return lambda error: isinstance(error, classes)
    rule = retry_on
    return lambda error: isinstance(error, Exception) and checked(rule(error), "retry_on")
