"""Names the request that a unit of work belongs to, without anything that its client chose."""

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from asgi_dbsession.types import Scope

# Names a request by its scope.
RouteName: TypeAlias = Callable[[Scope], str]

_METHODS = frozenset(
    ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE")
)


def name_of(unit: Any, route: RouteName | None) -> str:
    """The method and the route of a unit's request, such as `GET /orders/{id}`.

    Args:
        unit: The unit of work.
        route: Names the route instead of the framework.
    """
    scope = unit.scope
    if scope is None:
        return "begin()"
    kind = scope.get("method", "WebSocket")
    name = kind if kind in _METHODS or kind == "WebSocket" else "Other"
    found = route(scope) if route is not None else route_of(scope)
    # A begin() inside of a request holds a connection of its own.
    return f"{name} {found}" if unit.enclosing is None else f"{name} {found} › begin()"


def route_of(scope: Scope) -> str:
    """The route as the application wrote it. The path itself may contain a secret."""
    # FastAPI and Starlette; Litestar.
    path = getattr(scope.get("route"), "path", None) or scope.get("path_template")
    if isinstance(path, str):
        return path
    endpoint = scope.get("endpoint") or _quart_endpoint()
    name = endpoint if isinstance(endpoint, str) else getattr(endpoint, "__qualname__", None)
    return name or "(no route)"


def _quart_endpoint() -> str | None:
    quart: Any = sys.modules.get("quart")
    if quart is None or not quart.has_request_context():
        return None
    rule = quart.request.url_rule
    return None if rule is None else str(rule.rule)
