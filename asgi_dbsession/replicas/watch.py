"""Notices a lost connection to a replica, and then replaces all connections opened before."""

from time import monotonic
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry
from typing_extensions import override

from asgi_dbsession.session.lost import is_lost
from asgi_dbsession.unit.observer import UnitObserver

from .server import Server

# Under this key, the `info` dictionary of a connection has the time when the connection was opened.
OPENED = "asgi_dbsession.opened"


class Watch(UnitObserver):
    """Stops reads from a replica after a lost connection, until the replica answers again.

    Connections of the pool that were opened before the loss are replaced when they are next used.
    """

    def __init__(self, server: Server) -> None:
        self._server = server

    @override
    def engine_used(self, engine: Engine) -> None:
        event.listen(engine, "handle_error", self._record)
        event.listen(engine, "connect", _record_time)
        event.listen(engine, "checkout", self._refuse_old)

    def _record(self, context: ExceptionContext) -> None:
        if is_lost(context):
            self._server.lost()

    def _refuse_old(self, _driver: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
        if record.info[OPENED] < self._server.lost_at:
            raise DisconnectionError


def _record_time(_driver: object, record: ConnectionPoolEntry) -> None:
    record.info[OPENED] = monotonic()
