"""Rolls back all changes of a session, in the database and in memory."""

from sqlalchemy.orm import Session


def roll_back(session: Session) -> bool:
    """Roll back, and return True if the server has confirmed the rollback."""
    try:
        if not session.in_transaction() and _has_changes(session):
            # Another task changed these objects during an earlier COMMIT. Without a transaction,
            # `rollback()` would keep the changes, and the next COMMIT would store them.
            session.begin()
        session.rollback()
    except Exception:
        # The connection was lost. The server rolls back the transaction of a lost connection by
        # itself, unless the transaction is prepared.
        if session.in_transaction():
            session.invalidate()
        return False
    return True


def _has_changes(session: Session) -> bool:
    return bool(session.new or session.deleted or session.identity_map.check_modified())
