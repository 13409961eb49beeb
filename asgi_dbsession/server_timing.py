"""Tells the browser what its response cost the database."""

from contextvars import ContextVar

from .report import UnitReport
from .types import ASGIApp, Message, Receive, Scope, Send

_noted: ContextVar[list[UnitReport] | None] = ContextVar(
    "asgi_dbsession.server_timing", default=None
)


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
        """Keep a report for the response of its request; outside of one, do nothing."""
        noted = _noted.get()
        if noted is not None:
            noted.append(report)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        noted: list[UnitReport] = []

        async def add_header_then_send(message: Message) -> None:
            if noted and message["type"] == "http.response.start":
                header = (b"server-timing", _as_header(noted).encode("ascii"))
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        token = _noted.set(noted)
        try:
            await self.app(scope, receive, add_header_then_send)
        finally:
            _noted.reset(token)


def _as_header(noted: list[UnitReport]) -> str:
    used = [each for report in noted for each in report.databases]
    statements = sum(each.statements for each in used)
    work = sum(each.operation_duration for each in used) * 1000
    wait = sum(each.wait_time for each in used) * 1000
    return f'db;desc="statements: {statements}";dur={work:.1f}, db_wait;dur={wait:.1f}'
