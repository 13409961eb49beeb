"""Finds the route of a request: the declared path, such as `/orders/{id}`, or the handler."""

from asgi_dbsession.types import Scope


def route_of(scope: Scope) -> str:
    """Return the declared route or the name of the handler.

    Do not return the path of the request: the client chose it, and it may contain a secret.
    """
    # FastAPI and Starlette set `route` in the scope; Litestar sets `path_template`.
    path = getattr(scope.get("route"), "path", None) or scope.get("path_template")
    if isinstance(path, str):
        return path
    return str(getattr(scope.get("endpoint"), "__qualname__", ""))
