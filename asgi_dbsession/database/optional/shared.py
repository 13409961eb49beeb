"""Warns if all sessions of an engine share one connection, and so one transaction."""

import logging
from weakref import WeakSet

from sqlalchemy import Engine

from asgi_dbsession.errors import without_secrets

_logger = logging.getLogger("asgi_dbsession")
_warned: WeakSet[Engine] = WeakSet()


def warn_of_shared_connection(engine: Engine) -> None:
    """Log a warning that several sessions of an engine may share one connection.

    Then they also share one transaction, and the COMMIT of one request stores the unfinished work
    of another request. The warning is logged once for each engine.
    """
    if engine not in _warned:
        _warned.add(engine)
        _logger.warning(
            "Requests at the same time share one connection of %s, because its engine has a %s. "
            "The COMMIT of one request then stores the work of another request, even if that one "
            "fails. Give the URL to `AsyncDatabase` or `SyncDatabase`, without `poolclass`. "
            "Tests may ignore this if they send one request at a time, and open no `begin()` "
            "inside a request.",
            without_secrets(engine.url),
            type(engine.pool).__name__,
        )
