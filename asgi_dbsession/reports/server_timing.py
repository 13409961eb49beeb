"""Tells the browser what its response cost the database."""

from contextvars import ContextVar

from asgi_dbsession.types import ASGIApp, Message, Receive, Scope, Send
from asgi_dbsession.unit.report import UnitReport


class _Header:
    def __init__(self) -> None:
        # None once it has left, for a stream or a task may go on for long.
        self.noted: list[UnitReport] | None = []


_current: ContextVar[_Header | None] = ContextVar("asgi_dbsession.server_timing", default=None)


class ServerTimingMiddleware:
    """Give each response a `Server-Timing` header, which browsers show beside the request.

    Goes around `DBSessionMiddleware(..., on_report=ServerTimingMiddleware.note)`. The header leaves
    with the status, so it tells of the units that have ended by then: the response's, and each
    `begin()` and `on_commit` function before it. `db` is the time that the databases were at work,
    `db_wait` the time spent waiting for connections. A response without a session has no such
    header.
    Source: https://www.w3.org/TR/server-timing/

    Args:
        app: The ASGI application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app: ASGIApp = app

    @staticmethod
    def note(report: UnitReport) -> None:
        """Keep a report for the header of its request; where there is none to come, do nothing."""
        header = _current.get()
        noted = header.noted if header is not None else None
        if noted is not None:
            noted.append(report)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
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
