"""Names the request of a unit of work, without any text that the client chose."""

import logging
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from asgi_dbsession.asgi.route import route_of
from asgi_dbsession.types import Scope

_logger = logging.getLogger("asgi_dbsession")

# A function that returns a name for the request of an ASGI scope.
RouteName: TypeAlias = Callable[[Scope], str]

_METHODS = frozenset(
    ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE")
)


def name_of(unit: Any, route: RouteName | None, hint: str = "") -> str:
    """Return the method and the route of the unit's request, such as `GET /orders/{id}`.

    Args:
        unit: The unit of work.
        route: A function that names the request; None for the route of the framework.
        hint: The route in Quart, which only code inside Quart's request context can find.
    """
    scope = unit.scope
    if scope is None:
        return "begin()"
    kind = scope.get("method", "WebSocket")
    name = kind if kind in _METHODS or kind == "WebSocket" else "Other"
    found = (route_of(scope) or hint or "(no route)") if route is None else _call(route, scope)
    # A `begin()` inside a request holds a connection of its own, so show the `begin()` separately.
    return f"{name} {found}" if unit.enclosing is None else f"{name} {found} › begin()"


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
