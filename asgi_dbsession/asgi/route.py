"""Names the route of a request, without any text that the client chose."""

from asgi_dbsession.types import Scope


def route_of(scope: Scope) -> str:
    """Return the declared route or the handler, never the path, which may contain a secret."""
    # FastAPI and Starlette set `route` in the scope; Litestar sets `path_template`.
    path = getattr(scope.get("route"), "path", None) or scope.get("path_template")
    if isinstance(path, str):
        return path
    return str(getattr(scope.get("endpoint"), "__qualname__", ""))
