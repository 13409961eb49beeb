"""The transaction class of sessions with a lock; each method holds the lock of the session."""

from typing import Any

from sqlalchemy.orm import SessionTransaction

from ._sqlalchemy import NamingTransaction
from .companion import Companion
from .guard import locked


class LockedTransaction(NamingTransaction):
    """The transaction object that `session.begin()` and `session.begin_nested()` return."""

    @property
    def _companion(self) -> Companion:
        session: Any = self.session
        companion: Companion = session._companion
        return companion


for _name in ("close", "commit", "prepare", "rollback"):
    setattr(LockedTransaction, _name, locked(getattr(SessionTransaction, _name)))
