"""Logs an error if a handler changed objects after the client had disconnected."""

import logging
from collections.abc import Iterable
from typing import Any

from asgi_dbsession.session.end import Reason
from asgi_dbsession.session.managed import ManagedSession

from .unit_of_work import UnitOfWork

_logger = logging.getLogger("asgi_dbsession")
_UNSAVED = (
    "%d changed objects were not stored, because the response was cut short: %a. To store objects "
    "in that case, add them in `async with database.begin() as session:`."
)


def log_unsaved(unit: UnitOfWork, opened: Iterable[ManagedSession[Any]], reason: Reason) -> None:
    """Log an error if changed objects were lost because the response was not completed."""
    if reason not in ("cancelled", "unfinished"):
        return
    unsaved = sum(
        len(each.orm.new) + len(each.orm.dirty) + len(each.orm.deleted) for each in opened
    )
    if unsaved:
        _logger.error(_UNSAVED, unsaved, unit.scope["path"] if unit.scope else "")
