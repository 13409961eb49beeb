"""The class `LivePage`: a web page that shows which code is holding which connection now."""

import json
from functools import partial
from secrets import token_urlsafe
from time import perf_counter
from typing import Any

import anyio

from asgi_dbsession.database.arguments import check_function
from asgi_dbsession.database.async_database import AsyncDatabase
from asgi_dbsession.database.sync_database import SyncDatabase
from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.types import Receive, Scope, Send

from . import tables
from .access import Allow, is_local
from .answer import CSS_AND_SCRIPT, answer, begin_events
from .document import render
from .findings import Finding, find
from .metrics import render_metrics
from .now import DatabaseNow, Now
from .observer import LiveObserver
from .recent import Recent, summarize
from .route import RouteName
from .timeline import draw

# How many seconds lie between two updates of the web page that shows database connections.
_PERIOD = 1.0
# A stream of updates ends after this number of seconds, and the browser opens a new one. A server
# that is shutting down waits for the end of the stream.
_STREAM = 10.0

_REFUSAL = "This page is for clients on the same machine. LivePage(allow=...) lets others in.\n"
_NO_METRICS = "Install prometheus-client for metrics: pip install prometheus-client\n"


class LivePage:
    """Shows which requests hold or wait for connections now, and what the last requests did.

    Mount the page at any path: `app.mount("/db", LivePage(database))`. From then on, the page
    records what units of work do with its databases. The page itself needs no connection. Below the
    path of the page, `/json` returns the same data for scripts. `/metrics` returns metrics for
    Prometheus, if the package `prometheus-client` is installed.

    The page shows methods, routes, lines of code and statements. It shows no values: no path that a
    client sent, no parameter of a statement, no header and no body.

    Args:
        *databases: The databases to show, each an `AsyncDatabase` or a `SyncDatabase`. Their
            replicas are shown too.
        allow: A plain function that takes the ASGI scope of a request for the page, and returns
            True if the client may see the page. None: only clients on the same machine may see it,
            if they ask for `localhost` or its address and use no proxy.
        route: A plain function that takes an ASGI scope and returns a name for the request. None to
            use the route that is declared in the framework.

    Raises:
        ConfigurationError: An argument is wrong.
    """

    def __init__(
        self,
        *databases: AsyncDatabase[Any] | SyncDatabase[Any],
        allow: Allow | None = None,
        route: RouteName | None = None,
    ) -> None:
        _check(databases, allow=allow, route=route)
        shown = tuple(each for given in databases for each in (given, *given.replicas))
        self._databases: tuple[Any, ...] = shown
        self._allow: Allow = is_local if allow is None else allow
        self._observer = LiveObserver(shown, route)
        self._now = Now(shown, self._observer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request for the web page that shows connections, or for its data.

        The data are below the path of the web page, at `/json`, `/metrics` and `/events`.
        """
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            raise ConfigurationError("LivePage serves HTTP alone. Mount it in an application.")
        reply = partial(answer, send, has_body=scope["method"] != "HEAD")
        # Compare with True, because the application's `allow` may return a coroutine by mistake. A
        # coroutine counts as true, and would show the page to every client.
        if self._allow(scope) is not True:
            await reply(403, _REFUSAL)
        elif scope["method"] not in ("GET", "HEAD"):
            await reply(405, "The page can only be read.\n", allow="GET, HEAD")
        else:
            await self._show(_wanted(scope), scope, receive, send)

    async def _show(self, wanted: str, scope: Scope, receive: Receive, send: Send) -> None:
        reply = partial(answer, send, has_body=scope["method"] != "HEAD")
        if wanted == "json":
            await reply(200, json.dumps(self._facts(), indent=1), "application/json")
        elif wanted == "metrics":
            text = render_metrics(self._now.look(), self._observer.current_totals())
            if text is None:
                await reply(501, _NO_METRICS)
            else:
                await reply(200, text, "text/plain; version=0.0.4")
        elif wanted == "events" and scope["method"] == "GET":
            await self._stream(receive, send)
        else:
            nonce = token_urlsafe(16)
            summary, parts = self._parts()
            policy = CSS_AND_SCRIPT.format(nonce=nonce)
            await reply(200, render(nonce, summary, parts), "text/html", policy=policy)

    async def _stream(self, receive: Receive, send: Send) -> None:
        """Send new content of `LivePage` (a web page) to the browser every `_PERIOD` seconds.

        The response is an event stream. It ends when the browser disconnects, or after `_STREAM`
        seconds.
        """
        await begin_events(send)

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(leave)
            with anyio.move_on_after(_STREAM):
                while True:
                    summary, parts = self._parts()
                    data = json.dumps({"summary": summary, "html": parts})
                    body = f"retry: 300\ndata: {data}\n\n".encode()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    await anyio.sleep(_PERIOD)
            await send({"type": "http.response.body", "body": b""})
            group.cancel_scope.cancel()

    def _parts(self) -> tuple[str, dict[str, str]]:
        databases, recent, found = self._look()
        parts = {
            "findings": tables.findings(found),
            "now": tables.now(databases),
            "timeline": draw(self._observer.ended(), perf_counter()),
            "recent": tables.recent(recent),
        }
        return tables.summary(databases), parts

    def _facts(self) -> dict[str, Any]:
        databases, recent, found = self._look()
        return {"findings": found, "now": databases, "recent": recent}

    def _look(self) -> tuple[list[DatabaseNow], Recent, list[Finding]]:
        databases = self._now.look()
        recent = summarize(self._observer.ended(), perf_counter())
        return databases, recent, find(databases, recent)


def _wanted(scope: Scope) -> str:
    """Return the form in which a request asks for the web page `LivePage`, for example `json`.

    The form is in the path (`/json`) or in the query (`?json`). The links on the web page use the
    query. Such a link works if the path of the web page ends with a slash, and also if it does not.
    """
    last = scope["path"].rstrip("/").rpartition("/")[2]
    query: str = scope.get("query_string", b"").decode("latin-1")
    return last if last in ("events", "json", "metrics") else query


def _check(databases: tuple[object, ...], **functions: object) -> None:
    if not databases:
        raise ConfigurationError("LivePage needs at least one database to show.")
    for each in databases:
        if not isinstance(each, AsyncDatabase | SyncDatabase):
            raise ConfigurationError(
                f"LivePage takes an AsyncDatabase or a SyncDatabase, not something of type "
                f"{type(each).__name__}. Give it the object that DBSessionMiddleware has."
            )
    for name, function in functions.items():
        if function is not None:
            check_function(name, function, "scope")
