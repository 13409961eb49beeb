"""Names the request that a unit of work belongs to, without anything that its client chose."""

import logging
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from asgi_dbsession.types import Scope

_logger = logging.getLogger("asgi_dbsession")

# Names a request by its scope.
RouteName: TypeAlias = Callable[[Scope], str]

_METHODS = frozenset(
    ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE")
)


def name_of(unit: Any, route: RouteName | None, hint: str = "") -> str:
    """The method and the route of a unit's request, such as `GET /orders/{id}`.

    Args:
        unit: The unit of work.
        route: Names the route instead of the framework.
        hint: The route by Quart, which tells it in its own context only.
    """
    scope = unit.scope
    if scope is None:
        return "begin()"
    kind = scope.get("method", "WebSocket")
    name = kind if kind in _METHODS or kind == "WebSocket" else "Other"
    found = (route_of(scope) or hint or "(no route)") if route is None else _call(route, scope)
    # A begin() inside of a request holds a connection of its own.
    return f"{name} {found}" if unit.enclosing is None else f"{name} {found} › begin()"


def _call(route: RouteName, scope: Scope) -> str:
    try:
        return str(route(scope))
    except Exception:  # the request has nothing to do with it
        _logger.exception("%r failed; the request is shown without a route.", route)
        return "(route failed)"


def route_of(scope: Scope) -> str:
    """The route as the application wrote it, or its handler. The path may contain a secret."""
    # FastAPI and Starlette; Litestar.
    path = getattr(scope.get("route"), "path", None) or scope.get("path_template")
    if isinstance(path, str):
        return path
    return str(getattr(scope.get("endpoint"), "__qualname__", ""))


def route_by_quart() -> str:
    """The route of the request that is current in Quart; empty if none is."""
    quart: Any = sys.modules.get("quart")
    if quart is None or not quart.has_request_context():
        return ""
    return str(getattr(quart.request.url_rule, "rule", ""))
