"""Rolls back all changes of a session, both in the database and in its Python objects."""

from sqlalchemy.orm import Session


def roll_back(session: Session) -> bool:
    """Roll back the session. Return True if the server has confirmed the rollback."""
    try:
        if not session.in_transaction() and has_changes(session):
            # Another task changed these objects while an earlier COMMIT was running. If the session
            # has no transaction, `rollback()` does not undo the changes, and the next COMMIT would
            # store them. So begin a transaction first.
            session.begin()
        session.rollback()
    except Exception:
        # The connection was lost. The server then rolls back the transaction by itself, unless the
        # transaction is prepared for a two-phase commit.
        if session.in_transaction():
            session.invalidate()
        return False
    return True


def has_changes(session: Session) -> bool:
    """Return True if the session has changed objects that were not sent to the database yet."""
    return bool(session.new or session.deleted or session.identity_map.check_modified())
