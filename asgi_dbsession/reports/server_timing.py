"""Adds a `Server-Timing` header to responses, which says how long the databases worked."""

from contextvars import ContextVar

from asgi_dbsession.errors import ConfigurationError, kind_of
from asgi_dbsession.types import ASGIApp, Message, Receive, Scope, Send
from asgi_dbsession.unit.report import UnitReport


class _Header:
    def __init__(self) -> None:
        # The reports for the header `Server-Timing`. None after the header was sent, so that later
        # reports, in a long stream for example, use no memory.
        self.noted: list[UnitReport] | None = []


_current: ContextVar[_Header | None] = ContextVar("asgi_dbsession.server_timing", default=None)


class ServerTimingMiddleware:
    """Adds a `Server-Timing` header to each response, which browsers show in their network view.

    Wrap this middleware around `DBSessionMiddleware(..., on_report=ServerTimingMiddleware.note)`.
    In the header, `db` is the time that the databases worked. `db_wait` is the time that the
    request waited for connections. The header covers only work that ended before the response
    started. If the request used no session, there is no header. Source:
    https://www.w3.org/TR/server-timing/

    Args:
        app: The ASGI application to wrap.

    Raises:
        ConfigurationError: `app` is not an ASGI application.
    """

    def __init__(self, app: ASGIApp) -> None:
        if not callable(app):
            raise ConfigurationError(
                f"ServerTimingMiddleware wraps an ASGI application, not {kind_of(app)}. As "
                "`on_report`, give its method `ServerTimingMiddleware.note`."
            )
        self.app: ASGIApp = app

    @staticmethod
    def note(report: UnitReport) -> None:
        """Add a report to the header `Server-Timing` of the response to the current request.

        Do nothing if the header was sent already, or if no request is being served.
        """
        header = _current.get()
        noted = header.noted if header is not None else None
        if noted is not None:
            noted.append(report)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope, and add the header `Server-Timing` to an HTTP response."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        header = _Header()

        async def add_header_then_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                noted, header.noted = header.noted, None
                if noted:
                    timing = (b"server-timing", _as_header(noted).encode("ascii"))
                    message = {**message, "headers": [*message.get("headers", ()), timing]}
            await send(message)

        token = _current.set(header)
        try:
            await self.app(scope, receive, add_header_then_send)
        finally:
            _current.reset(token)
            header.noted = None


def _as_header(noted: list[UnitReport]) -> str:
    used = [each for report in noted for each in report.databases]
    statements = sum(each.statements for each in used)
    work = sum(each.operation_duration for each in used) * 1000
    wait = sum(each.wait_time for each in used) * 1000
    return f'db;desc="statements: {statements}";dur={work:.1f}, db_wait;dur={wait:.1f}'
