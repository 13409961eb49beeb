"""Names the request of a unit of work, without any text that the client chose."""

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from asgi_dbsession.asgi.route import route_of
from asgi_dbsession.types import Scope

_logger = logging.getLogger("asgi_dbsession")

# A function that returns a name for the request of an ASGI scope.
RouteName: TypeAlias = Callable[[Scope], str]

_METHODS = frozenset(
    ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE")
)
_SHOWN = _METHODS | {"WebSocket"}

# What names a request: its method, its route, and True for a `begin()` inside of the request; None
# outside of a request.
Named: TypeAlias = tuple[str, str, bool] | None


def named(unit: Any, route: RouteName | None, by_quart: Mapping[Any, str]) -> Named:
    """Return what names the request of a unit of work, without a reference to the request.

    Args:
        unit: The unit of work.
        route: A function that names the request; None for the route of the framework.
        by_quart: The routes of Quart, which only code inside Quart's request context can find.
    """
    scope = unit.scope
    if scope is None:
        return None
    try:
        found = scope["route"].path if route is None else _call(route, scope)
    except (KeyError, AttributeError):  # only FastAPI and Starlette have this route
        found = route_of(scope) or by_quart.get(unit, "")
    return scope.get("method", "WebSocket"), found, unit.enclosing is not None


def name_of(found: Named) -> str:
    """Return the method and the route of a request, such as `GET /orders/{id}`."""
    if found is None:
        return "begin()"
    method, route, is_inner = found
    name = f"{method if method in _SHOWN else 'Other'} {route or '(no route)'}"
    # A `begin()` inside a request holds a connection of its own, so show the `begin()` separately.
    return f"{name} › begin()" if is_inner else name


def _call(route: RouteName, scope: Scope) -> str:
    try:
        return str(route(scope))
    # An error of the function `route` must not fail the request, so log the error.
    except Exception:
        _logger.exception("%r failed; the request is shown without a route.", route)
        return "(route failed)"


def route_by_quart() -> str:
    """Return the route of Quart's current request; an empty string outside of such a request."""
    quart: Any = sys.modules.get("quart")
    if quart is None or not quart.has_request_context():
        return ""
    return str(getattr(quart.request.url_rule, "rule", ""))
