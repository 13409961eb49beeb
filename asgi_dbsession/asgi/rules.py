"""Calls the functions `commit_when` and `read_only`, which decide what a request may store."""

from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from asgi_dbsession.database.arguments import accepts, check_function, signature_of
from asgi_dbsession.errors import ConfigurationError, kind_of
from asgi_dbsession.types import Scope
from asgi_dbsession.unit.unit_of_work import UnitOfWork

CommitWhen: TypeAlias = Callable[[int], bool] | Callable[[int, Scope], bool]
CommitRule: TypeAlias = Callable[[int, Scope], bool]
ReadOnly: TypeAlias = Callable[[Scope], bool]

_BAD_REQUEST = 400
_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "TRACE"))


def below_400(status: int, _scope: Scope = None) -> bool:
    """Return True (commit) for a status below 400. This is the default for `commit_when`."""
    return status < _BAD_REQUEST


def commit_rule(commit_when: CommitWhen) -> CommitRule:
    """Make a function with two parameters (status, ASGI scope) from the option `commit_when`.

    `commit_when` may have one parameter (the status) or two. A second parameter with a default
    value gets the ASGI scope only if its name is `scope`.

    Raises:
        ConfigurationError: `commit_when` is not a plain function, or can be called neither with the
            status, nor with the status and the scope.
    """
    # If the application gave no `commit_when`, return `below_400` itself, which always returns True
    # or False. For a function of the application, return a wrapper that raises an error if the
    # result is neither True nor False.
    if commit_when is below_400:
        return below_400
    check_function("commit_when", commit_when)
    rule: Any = commit_when
    takes_status = accepts(rule, 0, follow_wrapped=True)
    takes_both = accepts(rule, 0, {}, follow_wrapped=True)
    if not (takes_status or takes_both):
        raise ConfigurationError(
            "commit_when takes a function of the status, or of the status and the scope. Write "
            "`def commit_when(status)` or `def commit_when(status, scope)`."
        )
    names = list(signature_of(rule).parameters)
    if takes_both and (not takes_status or names[1:2] == ["scope"]):
        return lambda status, scope: checked(rule(status, scope), "commit_when")
    return lambda status, _scope: checked(rule(status), "commit_when")


def safe_methods(scope: Scope) -> bool:
    """Return True for methods that should not change data: GET, HEAD, OPTIONS and TRACE."""
    return scope["type"] == "http" and scope["method"] in _SAFE_METHODS


def apply_read_rule(rule: ReadOnly, unit: UnitOfWork, scope: Scope) -> None:
    """Call the function `read_only` of the application, and store its result in the unit of work.

    Raises:
        ConfigurationError: The function returned neither True nor False. Or the request may only
            read, but an outer DBSessionMiddleware has opened its session and allows writes.
    """
    unit.read_only = checked(rule(scope), "read_only")
    if not unit.read_only or not unit.joins_outer_unit:
        return
    for database in unit.databases:
        outer = next(each for each in unit.of_same_request() if each.manages(database))
        if not outer.read_only:
            raise ConfigurationError(
                f"This request may only read {database}, but an outer DBSessionMiddleware "
                "opens the session and lets it write. Give `read_only` to the outer one too."
            )


def checked(decision: object, rule: str) -> bool:
    """Return `decision` if it is True or False, and raise an error for any other value.

    Args:
        decision: The value that a function of the application returned, for example `commit_when`.
        rule: The name of the middleware option that has this function, for the error text.

    Raises:
        ConfigurationError: `decision` is neither True nor False.
    """
    if decision is True or decision is False:
        return decision
    raise wrong_result(decision, rule, "True or False")


def wrong_result(result: object, option: str, wanted: str) -> ConfigurationError:
    """Return the error for a wrong result of a function of the application.

    Args:
        result: The value that the function returned.
        option: The name of the middleware option that has this function.
        wanted: What the function must return.
    """
    cure = ""
    if isinstance(result, Coroutine):
        # The application's function is an `async def` function, and so has returned a coroutine.
        # Close the coroutine. Otherwise Python would warn that the coroutine was never awaited.
        result.close()
        cure = " Write a plain function, which is not awaited."
    return ConfigurationError(
        f"{option} must return {wanted}, and returned {kind_of(result)}.{cure}"
    )
