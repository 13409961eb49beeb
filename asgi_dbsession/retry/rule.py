"""Makes a function from the option `retry_on`, which tells if an error is retried."""

from collections.abc import Callable, Coroutine
from typing import TypeAlias

from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.unit.retry_on import RetryOn

Rule: TypeAlias = Callable[[BaseException], bool]


def rule_of(retry_on: RetryOn) -> Rule:
    """Return a function that tells if an error is retried in the same way as a conflict."""
    if retry_on is None:
        return lambda _: False
    if isinstance(retry_on, type | tuple):
        classes = retry_on
        return lambda error: isinstance(error, classes)
    predicate = retry_on
    return lambda error: isinstance(error, Exception) and _checked(predicate(error))


def _checked(decision: object) -> bool:
    if decision is True or decision is False:
        return decision
    if isinstance(decision, Coroutine):
        # Close the coroutine, so that Python does not warn about a coroutine that was never
        # awaited.
        decision.close()
    raise ConfigurationError(
        "retry_on must return True or False, and returned something of type "
        f"{type(decision).__name__}. Write a plain function, which is not awaited."
    )
