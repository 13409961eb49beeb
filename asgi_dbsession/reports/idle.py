"""Warns of connections that a request holds while it does something else."""

import logging
from collections.abc import Callable

from asgi_dbsession.unit.report import DatabaseReport, UnitReport

_logger = logging.getLogger("asgi_dbsession")


def warn_when_idle(seconds: float = 1) -> Callable[[UnitReport], None]:
    """A function for `DBSessionMiddleware(on_report=...)`, or to be called by yours.

    The logger `asgi_dbsession` warns with the place in the code: an HTTP call inside of a
    transaction keeps a connection from the other requests, and its locks on its rows.

    Args:
        seconds: How long a connection may be held without a statement.
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
    return text.encode("unicode_escape").decode()  # a client chose it


def _places(report: DatabaseReport) -> tuple[str, str]:
    return report.idle_after or "its checkout", report.idle_before or "the end of the unit of work"
