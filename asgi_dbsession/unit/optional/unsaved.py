"""Logs an error if changed objects are lost because a response was cut short."""

import logging
from collections.abc import Iterable
from typing import Any

from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.unit.unit_of_work import UnitOfWork

_logger = logging.getLogger("asgi_dbsession")
_UNSAVED = (
    "%d changed object(s) were not stored, because the response was cut short: %a. To store "
    "objects in that case, add them in `async with database.begin() as session:`."
)


def log_unsaved(unit: UnitOfWork, opened: Iterable[ManagedSession[Any]]) -> None:
    """If changed objects are lost because a response was cut short, log how many."""
    unsaved = sum(
        len(each.orm.new) + len(each.orm.dirty) + len(each.orm.deleted) for each in opened
    )
    if unsaved:
        _logger.error(_UNSAVED, unsaved, unit.scope["path"] if unit.scope else "")
