"""Applies the middleware option `read_only`, which tells which requests may only read."""

from collections.abc import Callable
from typing import TypeAlias

from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.types import Scope
from asgi_dbsession.unit.unit_of_work import UnitOfWork

from .answer import checked

ReadOnly: TypeAlias = Callable[[Scope], bool]

_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "TRACE"))


def safe_methods(scope: Scope) -> bool:
    """Return True for methods that should not change data: GET, HEAD, OPTIONS and TRACE."""
    return scope["type"] == "http" and scope["method"] in _SAFE_METHODS


def apply_read_rule(rule: ReadOnly, unit: UnitOfWork, scope: Scope) -> None:
    """Call the function `read_only` of the application, and store its result in the unit of work.

    Raises:
        ConfigurationError: The function returned neither True nor False. Or the request may only
            read, but its sessions belong to an outer DBSessionMiddleware that allows writes.
    """
    unit.read_only = checked(rule(scope), "read_only")
    if not unit.read_only or not unit.joins_outer_unit:
        return
    for database in unit.databases:
        outer = next(each for each in unit.of_same_request() if each.manages(database))
        if not outer.read_only:
            raise ConfigurationError(
                f"This request may only read {database}, but a DBSessionMiddleware further out "
                "opens the session and lets it write. Give `read_only` to that one too."
            )
