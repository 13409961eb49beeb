"""Checks the option `commit_when`, which decides by the response status if work is committed."""

from collections.abc import Callable
from http import HTTPStatus
from inspect import Signature, signature
from typing import Any, TypeAlias

from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.types import Scope

from .answer import checked

CommitWhen: TypeAlias = Callable[[int], bool] | Callable[[int, Scope], bool]
CommitRule: TypeAlias = Callable[[int, Scope], bool]

# `HTTPStatus.BAD_REQUEST` is an enumeration member, and slower to compare than an `int`.
_BAD_REQUEST = int(HTTPStatus.BAD_REQUEST)


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
        parameters = signature(rule)
    # Python cannot tell the parameters of some builtin functions. Call such a function with the
    # status alone.
    except (TypeError, ValueError):
        return False
    of_status, of_both = _bind(parameters, 0), _bind(parameters, 0, {})
    if not (of_status or of_both):
        raise ConfigurationError(
            "commit_when takes a function of the status, or of the status and the scope. Write "
            "`def commit_when(status)` or `def commit_when(status, scope)`."
        )
    return not of_status or of_both[1:] == ["scope"]


def _bind(parameters: Signature, *arguments: object) -> list[str]:
    """Return the names of the parameters that get the arguments; empty if the call would fail."""
    try:
        return list(parameters.bind(*arguments).arguments)
    except TypeError:
        return []
