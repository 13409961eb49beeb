"""Makes the name of a request, for the web page that shows database connections.

For example, the name is `GET /orders/{id}`. It contains no text that the client sent.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from asgi_dbsession.asgi.route import route_of
from asgi_dbsession.types import Scope

_logger = logging.getLogger("asgi_dbsession")

# A function that gets an ASGI scope, and returns a name for its request.
RouteName: TypeAlias = Callable[[Scope], str]

_METHODS = frozenset(
    ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE")
)
_SHOWN = _METHODS | {"WebSocket"}

# What the name of a unit of work is made from: the tuple (method of the request, its route, flag).
# The flag is True for a `begin()` block inside the request, and False for the request itself. A
# `begin()` block outside of a request has None instead of a tuple.
Named: TypeAlias = tuple[str, str, bool] | None


def named(unit: Any, route: RouteName | None, by_quart: Mapping[Any, str]) -> Named:
    """Return the method and the route of a request, from which `name_of` makes its name.

    Call this function before the request ends, because the ASGI scope is not available later.

    Args:
        unit: The unit of work: a request, or a `begin()` block.
        route: A function that returns a name for a request. None to use the framework's route.
        by_quart: The routes of requests to the framework Quart. The keys are units of work.

    Returns:
        The method, the route, and True if `unit` is a `begin()` block inside the request. None for
        a `begin()` block outside of a request.
    """
    scope = unit.scope
    if scope is None:
        return None
    try:
        found = scope["route"].path if route is None else _call(route, scope)
    except (KeyError, AttributeError):
        # Only FastAPI and Starlette store a route object in the ASGI scope. For other frameworks,
        # look for the route elsewhere, or take the name of the handler.
        found = route_of(scope) or by_quart.get(unit, "")
    return scope.get("method", "WebSocket"), found, unit.enclosing is not None


def name_of(found: Named) -> str:
    """Return the name of a request: its method and its route, such as `GET /orders/{id}`."""
    if found is None:
        return "begin()"
    method, route, is_inner = found
    name = f"{method if method in _SHOWN else 'Other'} {route or '(no route)'}"
    # A `begin()` block in a request uses another connection than the request. So the block has a
    # name of its own on the web page that shows connections.
    return f"{name} › begin()" if is_inner else name


def _call(route: RouteName, scope: Scope) -> str:
    try:
        return str(route(scope))
    # The application's function `route` has failed. Only log the error, because the request itself
    # must not fail.
    except Exception:
        _logger.exception(
            "The route function %r failed. The request is shown without a route.", route
        )
        return "(route failed)"


def route_by_quart() -> str:
    """Return the route of the current request of the framework Quart, or an empty text."""
    quart: Any = sys.modules.get("quart")
    if quart is None or not quart.has_request_context():
        return ""
    return str(getattr(quart.request.url_rule, "rule", ""))
