"""Logs a warning if a request holds a connection for a long time without using it."""

import logging
from collections.abc import Callable

from asgi_dbsession.database.arguments import check_number
from asgi_dbsession.unit.report import DatabaseReport, UnitReport

_logger = logging.getLogger("asgi_dbsession")


def warn_when_idle(seconds: float = 1) -> Callable[[UnitReport], None]:
    """Return an `on_report` function that warns if a request held a connection without using it.

    Write `DBSessionMiddleware(on_report=warn_when_idle())`, or call the returned function in your
    own `on_report` function. The logger `asgi_dbsession` logs the lines of code before and after
    the idle time. Often the code between these lines calls another server. Meanwhile, no other
    request can use the connection, or change rows that the transaction has locked.

    Args:
        seconds: Warn if a connection was idle for this number of seconds or longer.

    Raises:
        ConfigurationError: `seconds` is not a number of seconds.
    """
    check_number("warn_when_idle", seconds, 0, seconds=True)

    def warn(report: UnitReport) -> None:
        for each in report.databases:
            if each.idle_time >= seconds:
                _logger.warning(
                    "%s held a connection of %s idle for %.2f s, between %s and %s. Do slow work "
                    "before the first statement, or after a `commit()`.",
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
    # The path comes from the client and may have line breaks in it. Escape them for the log.
    return text.encode("unicode_escape").decode()


def _places(report: DatabaseReport) -> tuple[str, str]:
    return report.idle_after or "its checkout", report.idle_before or "the end of the unit of work"
