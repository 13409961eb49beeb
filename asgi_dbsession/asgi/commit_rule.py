"""Checks the option `commit_when`, which decides by the response status if work is committed."""

from collections.abc import Callable
from http import HTTPStatus
from inspect import Parameter, signature
from typing import Any, TypeAlias

from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.types import Scope

from .answer import checked

CommitWhen: TypeAlias = Callable[[int], bool] | Callable[[int, Scope], bool]
CommitRule: TypeAlias = Callable[[int, Scope], bool]

# `HTTPStatus.BAD_REQUEST` is an enumeration member, and slower to compare than an `int`.
_BAD_REQUEST = int(HTTPStatus.BAD_REQUEST)
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def below_400(status: int) -> bool:
    """Return True (commit) for a status below 400. This is the default for `commit_when`."""
    return status < _BAD_REQUEST


def commit_rule(commit_when: CommitWhen) -> CommitRule:
    """Make a function of the status and the ASGI scope from the option `commit_when`.

    `commit_when` may have one parameter (the status) or two. A second parameter with a default
    value gets the ASGI scope only if its name is `scope`.

    Raises:
        ConfigurationError: `commit_when` cannot be called with the status, and not with the status
            and the scope.
    """
    if commit_when is below_400:
        return lambda status, _scope: status < _BAD_REQUEST
    rule: Any = commit_when
    if _takes_scope(rule):
        return lambda status, scope: checked(rule(status, scope), "commit_when")
    return lambda status, _scope: checked(rule(status), "commit_when")


def _takes_scope(rule: Callable[..., object]) -> bool:
    try:
        parameters = signature(rule).parameters.values()
    # Python cannot tell the parameters of some builtin functions. Call such a function with the
    # status alone.
    except (TypeError, ValueError):
        return False
    positional = [each for each in parameters if each.kind in _POSITIONAL]
    needed = [each for each in positional if each.default is Parameter.empty]
    keywords = [
        each
        for each in parameters
        if each.kind is Parameter.KEYWORD_ONLY and each.default is Parameter.empty
    ]
    takes_any = any(each.kind is Parameter.VAR_POSITIONAL for each in parameters)
    if len(needed) > len(("status", "scope")) or keywords or not (positional or takes_any):
        raise ConfigurationError(
            "commit_when takes a function of the status, or of the status and the scope. Write "
            "`def commit_when(status)` or `def commit_when(status, scope)`."
        )
    second = positional[1] if len(positional) > 1 else None
    return second is not None and (second in needed or second.name == "scope")
