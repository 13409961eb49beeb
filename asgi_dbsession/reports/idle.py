"""Warns if a request holds a connection for a long time without using the connection."""

import logging
from collections.abc import Callable

from asgi_dbsession.unit.report import DatabaseReport, UnitReport

_logger = logging.getLogger("asgi_dbsession")


def warn_when_idle(seconds: float = 1) -> Callable[[UnitReport], None]:
    """Return a function for `on_report` that warns if a request held a connection without use.

    Write `DBSessionMiddleware(on_report=warn_when_idle())`, or call the returned function in your
    own `on_report` function. The logger `asgi_dbsession` logs the warning, with the lines of code
    before and after the idle time. For example, the code may call another server inside a
    transaction. Meanwhile, no other request can use the connection or lock the same rows.

    Args:
        seconds: The shortest idle time that causes a warning, in seconds.
    """

    def warn(report: UnitReport) -> None:
        for each in report.databases:
            if each.idle_time >= seconds:
                _logger.warning(
                    "%s held a connection of %s idle for %.2f s, between %s and %s. Do what takes "
                    "long before the first statement, or after a `commit()`.",
                    _describe(report),
                    each.database,
                    each.idle_time,
                    *_places(each),
                )

    return warn


def _describe(report: UnitReport) -> str:
    if report.scope is None:
        return "A task that outlived its request"
    kind, path = report.scope["type"], report.scope.get("path", "")
    text = f"{report.scope.get('method', kind)} {path}"
    # Escape the path, because the client chose it and may have put line breaks into it.
    return text.encode("unicode_escape").decode()


def _places(report: DatabaseReport) -> tuple[str, str]:
    return report.idle_after or "its checkout", report.idle_before or "the end of the unit of work"
