"""Finds the route of a request, to name the request in logs and on web pages.

The route is the path that the application has declared, such as `/orders/{id}`. If there is none,
it is the name of the handler.
"""

from asgi_dbsession.types import Scope


def route_of(scope: Scope) -> str:
    """Return the declared path of the route, or the name of the handler.

    The real path of the request is never returned, because it may contain a secret.
    """
    # FastAPI and Starlette store the route in `scope["route"]`, Litestar in
    # `scope["path_template"]`.
    path = getattr(scope.get("route"), "path", None) or scope.get("path_template")
    if isinstance(path, str):
        return path
    return str(getattr(scope.get("endpoint"), "__qualname__", ""))
