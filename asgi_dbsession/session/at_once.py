"""Finds sessions whose commit or rollback sends nothing to the database, so cannot block."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from .companion import Companion
from .guard import GuardedSession
from .reads import has_only_read
from .roll_back import has_changes

# SQLAlchemy calls listeners of these events during a commit or rollback. A listener of the
# application may block the thread.
_OF_SESSIONS = (
    "after_commit",
    "after_rollback",
    "after_soft_rollback",
    "after_transaction_end",
    "before_commit",
)
_OF_CONNECTIONS = ("commit", "rollback")
_OF_POOLS = ("checkin", "reset")
_METHODS = ("close", "commit", "rollback")


def ends_at_once(session: Session, companion: Companion) -> bool:
    """Return True if commit and rollback of a session cannot block the calling thread.

    The result is True if all of this holds: the session has only read, no transaction has begun on
    the server, and the application has neither overridden the session's methods nor added
    listeners, because such code may block.
    """
    if companion.lock.is_busy or has_changes(session):
        return False
    if any(getattr(type(session), each) is not getattr(GuardedSession, each) for each in _METHODS):
        return False
    listeners = _listeners(session, _OF_SESSIONS)
    return not _has_foreign(listeners) and all(map(_sends_nothing, companion.open_connections))


def _sends_nothing(connection: Connection) -> bool:
    if _has_foreign(_listeners(connection, _OF_CONNECTIONS)):
        return False
    if _has_foreign(_listeners(connection.engine.pool, _OF_POOLS)):
        return False
    return has_only_read(connection)


def _listeners(target: Any, events: Iterable[str]) -> Iterable[Any]:
    return (each for name in events for each in getattr(target.dispatch, name))


def _has_foreign(listeners: Iterable[Any]) -> bool:
    return any(
        not str(getattr(each, "__module__", "")).startswith("asgi_dbsession.") for each in listeners
    )
