"""Logs a warning if a server-sent event is sent before the work of the request is committed."""

import logging
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction
from typing_extensions import override

from asgi_dbsession.asgi.route import route_of
from asgi_dbsession.session._sqlalchemy import has_changes
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.roll_back import with_outer
from asgi_dbsession.types import Message, Send
from asgi_dbsession.unit.observer import UnitObserver
from asgi_dbsession.unit.unit_of_work import UnitOfWork

_logger = logging.getLogger("asgi_dbsession")
_WARNING = (
    "An event of the route %a was sent before the work of its request was committed, and that "
    "COMMIT can still fail. If the event says that work is stored, call `commit()` before the "
    "event, or do the work in a `database.begin()` block that ends before the event is sent. This "
    "is logged once for each route."
)
# The routes for which the warning (a server-sent event was sent before COMMIT) was logged already.
# For each route, the warning is logged only once.
_warned: set[str] = set()


def warn_of_early_events(unit: UnitOfWork, send: Send) -> Send:
    """Return a `send` that logs a warning about server-sent events that are sent too early.

    An event is sent too early if the request has uncommitted writes. The COMMIT of these writes can
    still fail, but the client may already believe that they are stored.
    """
    writes = _Writes()
    unit.observers = (*unit.observers, writes)
    for database, opened in tuple(unit.sessions.items()):
        writes.session_opened(unit, database, opened)

    async def send_event(message: Message) -> None:
        body = message.get("body", b"")
        # Warn if an event is sent before COMMIT. But do not warn about a comment (a line that
        # begins with a colon): clients ignore comments, which only keep the connection open. See
        # https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
        if body and bytes(body[:1]) != b":":
            _warn(unit, writes)
        await send(message)

    return send_event


def _warn(unit: UnitOfWork, writes: "_Writes") -> None:
    route = route_of(unit.scope) if unit.scope is not None else ""
    if route in _warned:
        return
    if any(writes.are_pending(each.orm) for each in unit.opened):
        _warned.add(route)
        _logger.warning(_WARNING, route)


class _Writes(UnitObserver):
    """Remembers which sessions have written since the last commit or rollback.

    Each write is remembered together with the savepoint in which it was made. After a rollback to
    this savepoint, only the writes inside of the savepoint are forgotten.
    """

    def __init__(self) -> None:
        self._written: set[tuple[Session, SessionTransaction | None]] = set()

    @override
    def session_opened(self, unit: Any, database: Any, opened: ManagedSession[Any]) -> None:
        event.listen(opened.orm, "after_flush", self._record_flush)
        event.listen(opened.orm, "do_orm_execute", self._record_statement)
        event.listen(opened.orm, "after_commit", self._record_commit)
        event.listen(opened.orm, "after_soft_rollback", self._record_rollback)

    def are_pending(self, session: Session) -> bool:
        """Return True if the session has written or changed anything that is not committed yet."""
        return has_changes(session) or any(written is session for written, _ in self._written)

    def _record_flush(self, session: Session, _context: object) -> None:
        self._written.add((session, session.get_nested_transaction()))

    def _record_statement(self, state: ORMExecuteState) -> None:
        if state.is_insert or state.is_update or state.is_delete:
            self._record_flush(state.session, None)

    def _record_commit(self, session: Session) -> None:
        # SQLAlchemy also calls this listener when a savepoint is released. A later rollback can
        # still undo the writes, so record them as writes of the outer savepoint or transaction.
        savepoint = session.get_nested_transaction()
        if savepoint is None:
            self._forget(session, None)
        elif (session, savepoint) in self._written:
            self._written.discard((session, savepoint))
            around = (each for each in with_outer(savepoint.parent) if each.nested)
            self._written.add((session, next(around, None)))

    def _record_rollback(self, session: Session, transaction: SessionTransaction) -> None:
        self._forget(session, transaction if transaction.parent is not None else None)

    def _forget(self, session: Session, savepoint: SessionTransaction | None) -> None:
        """Remove a session's writes from `_written`, the set of uncommitted writes in memory.

        Remove only the writes inside `savepoint`, or all writes of the session if this is None.
        """
        for each in tuple(self._written):
            if each[0] is session and (savepoint is None or savepoint in with_outer(each[1])):
                self._written.discard(each)
