"""Checks the arguments that applications give to public functions and classes."""

import sys
from collections.abc import Callable
from inspect import Signature, iscoroutinefunction, signature
from typing import Any

from asgi_dbsession.errors import ConfigurationError, kind_of


def check_flags(**given: object) -> None:
    """Raise an error if one of the arguments is neither True nor False."""
    for name, value in given.items():
        if value is not True and value is not False:
            raise ConfigurationError(f"{name} takes True or False, not {kind_of(value)}.")


def check_number(name: str, given: Any, least: int = 1, *, seconds: bool = False) -> None:
    """Raise an error if an argument is not a number, or below `least`.

    Args:
        name: The name of the argument.
        given: Its value.
        least: The lowest number that is allowed.
        seconds: True for a number of seconds, which may have a fraction.
    """
    # `isinstance` would accept True and False too, because `bool` is a subclass of `int`.
    is_number = isinstance(given, int | float if seconds else int) and not isinstance(given, bool)
    if is_number and given >= least:
        return
    # Show only numbers, because the caller may have passed a secret to the wrong argument.
    shown = given if is_number else kind_of(given)
    kind = "number of seconds" if seconds else "whole number"
    raise ConfigurationError(f"{name} takes a {kind}, {least} or more, not {shown}.")


def check_function(name: str, given: object, parameter: str | None = None, cure: str = "") -> None:
    """Raise an error if an argument is not a function, or is a function with `async def`.

    Args:
        name: The name of the argument.
        given: The argument itself.
        parameter: If the function must take one parameter: a name for this parameter, which the
            error text shows. None if the function may take any parameters.
        cure: A sentence for the end of the error text, used if the argument is not a function.
    """
    if not callable(given):
        raise ConfigurationError(f"{name} takes a plain function, not {kind_of(given)}.{cure}")
    if iscoroutinefunction(given):
        raise ConfigurationError(
            f"{name} takes a plain function, not a coroutine function. Write it with `def`, not "
            "`async def`."
        )
    # An object with the method `async def __call__`, such as a response, is no plain function.
    if parameter and (not accepts(given, parameter) or iscoroutinefunction(type(given).__call__)):
        raise ConfigurationError(
            f"{name} takes a plain function with one parameter. Write `def {name}({parameter})`."
        )


def signature_of(function: Callable[..., object], *, follow_wrapped: bool = True) -> Signature:
    """Return the parameters of a function, without evaluating its annotations.

    An annotation may name a class that only type checkers import. From Python 3.14 on, evaluating
    such an annotation fails.
    """
    try:
        if sys.version_info >= (3, 14):
            from annotationlib import Format

            text = Format.STRING
            return signature(function, follow_wrapped=follow_wrapped, annotation_format=text)
        return signature(function, follow_wrapped=follow_wrapped)
    # Python cannot tell the parameters of some builtin functions. Assume that these functions take
    # any parameters.
    except (TypeError, ValueError):
        return signature(lambda *_: None)


def accepts(
    function: Callable[..., object], *arguments: object, follow_wrapped: bool = False
) -> bool:
    """Return True if a function can be called with these arguments, as far as Python can tell.

    Args:
        function: The function.
        *arguments: The arguments.
        follow_wrapped: True to look at the function that a decorator wraps. False by default,
            because a decorator may add arguments.
    """
    try:
        signature_of(function, follow_wrapped=follow_wrapped).bind(*arguments)
    except TypeError:
        return False
    return True
