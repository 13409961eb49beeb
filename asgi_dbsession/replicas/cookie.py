"""Loads the WAL position of a client at the start of a request, and saves the new position.

The WAL position says up to which change the client has seen the database.
"""

import logging
import re
from collections.abc import Iterable
from typing import Any

from asgi_dbsession.types import ASGIApp, Message, Receive, Scope, Send

from .position import Seen
from .replica_set import ReplicaSet
from .seen_here import used_here

_logger = logging.getLogger("asgi_dbsession")

# Under this key, the ASGI scope has a dictionary: for each database with replicas (`ReplicaSet`),
# the WAL position up to which the client has seen the database. An inner DBSessionMiddleware uses
# the same dictionary.
_KEY = "asgi_dbsession.seen"
_SAFE = ("GET", "HEAD")
_SHARED = re.compile(rb"(?i)\b(public|s-maxage)\b")


class Positions:
    """Loads and saves the WAL position up to which each client has seen a database.

    The position is in a cookie, or in a store: an object of the application with the methods `load`
    and `save`.
    """

    def __init__(self, serve: ASGIApp, replica_sets: Iterable[ReplicaSet]) -> None:
        self._serve = serve
        self._replica_sets = tuple(replica_sets)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request or WebSocket."""
        outer: dict[ReplicaSet, Seen] = scope.get(_KEY, {})
        own = {each: await _load(each, scope) for each in self._replica_sets if each not in outer}

        async def tell_and_send(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                message = await _tell(own, scope, message)
            await send(message)

        scope[_KEY] = outer | own
        try:
            with used_here(scope[_KEY]):
                await self._serve(scope, receive, tell_and_send)
        finally:
            scope[_KEY] = outer
            # A streaming body may use the database after the response has started. A cookie cannot
            # be sent any more, but a store can still save the new WAL position.
            await _save(own, scope)


async def _load(replica_set: ReplicaSet, scope: Scope) -> Seen:
    options = replica_set.options
    if options.store is not None:
        try:
            return Seen(await options.store.load(scope))
        except Exception:
            _logger.exception("The store of positions failed, so requests read from the primary")
            return Seen("")
    found = list(_cookies(scope, options.cookie))
    if not found:
        return Seen()
    text, *others = found
    # If the client sent several cookies of this name, it is unknown which of them is right. Then
    # use an empty string, which makes the request read from the primary.
    return Seen("" if others else text)


def _cookies(scope: Scope, name: str) -> Iterable[str]:
    for header, value in scope["headers"]:
        if header == b"cookie" and name.encode() in value:
            for each in value.decode("latin-1").split(";"):
                found, _, text = each.strip().partition("=")
                if found == name:
                    yield text


async def _save(own: dict[ReplicaSet, Seen], scope: Scope) -> None:
    for replica_set, seen in own.items():
        store = replica_set.options.store
        if store is not None and (text := seen.news()) is not None:
            try:
                await store.save(scope, text)
            # The store of the application could not save which changes this client has seen. Only
            # log the error: the request may have committed already, so the request must not fail.
            except Exception:
                _logger.exception("The store of positions failed, so the next read may be outdated")


async def _tell(own: dict[ReplicaSet, Seen], scope: Scope, message: Message) -> Message:
    await _save(own, scope)
    headers: list[Any] = list(message.get("headers") or ())
    if scope.get("method") in _SAFE and _is_for_all(headers):
        return message
    for replica_set, seen in own.items():
        options = replica_set.options
        if options.store is None and (text := seen.news()) is not None:
            headers.append((b"set-cookie", _cookie(replica_set, text, scope).encode()))
    return {**message, "headers": headers}


def _cookie(replica_set: ReplicaSet, text: str, scope: Scope) -> str:
    options = replica_set.options
    secure = "; Secure" if scope.get("scheme") in ("https", "wss") else ""
    return (
        f"{options.cookie}={text}; Path={options.path}; Max-Age={options.lifetime}; HttpOnly; "
        f"SameSite=Lax{secure}"
    )


def _is_for_all(headers: list[tuple[bytes, bytes]]) -> bool:
    """Return True if a shared cache may store the response and give it to other clients."""
    return any(
        name.lower() == b"cache-control" and _SHARED.search(value) for name, value in headers
    )
