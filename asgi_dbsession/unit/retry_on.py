"""Checks the option `retry_on`: the errors to retry in the same way as conflicts."""

from collections.abc import Callable
from inspect import iscoroutinefunction
from typing import TypeAlias

from asgi_dbsession.errors import ConfigurationError, kind_of

RetryOn: TypeAlias = (
    type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool] | None
)


def check_retry_on(given: object) -> None:
    """Check the value that the application gave for `retry_on`.

    Raises:
        ConfigurationError: The value is neither an exception class, nor a tuple of exception
            classes, nor a plain function.
    """
    classes = given if isinstance(given, tuple) else (given,)
    if all(isinstance(each, type) and issubclass(each, Exception) for each in classes):
        return
    is_function = callable(given) and not isinstance(given, type)
    if given is None or (is_function and not iscoroutinefunction(given)):
        return
    if is_function:
        raise ConfigurationError(
            "retry_on takes a plain function, not a coroutine function. Write it with `def`, not "
            "`async def`."
        )
    raise ConfigurationError(
        "retry_on takes a class of exceptions, a tuple of such classes, or a plain function, not "
        f"{kind_of(given)}."
    )
