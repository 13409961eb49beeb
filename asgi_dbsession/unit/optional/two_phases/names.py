"""Names the transactions of a two-phase commit, so that an operator can end them after a crash."""

from secrets import token_hex
from threading import Lock
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import TwoPhaseTransaction
from sqlalchemy.orm import Session

_PREFIX = "asgi_dbsession_"


class Names:
    """Gives names to the two-phase transactions of one unit of work, before they begin.

    A name has a random text, the number of the transaction, and how many databases there are. After
    a crash, an operator finds prepared transactions by these names. If number 1 is still prepared,
    the operator must roll back all of them. Otherwise the operator must commit all of them.
    """

    def __init__(self, databases: int) -> None:
        self._databases = databases
        self._begun: list[Session] = []
        # The random text in the names of all transactions of this unit of work. An operator sees by
        # this text which transactions belong together. The method `renew` makes the text.
        self._unit = ""
        # This lock is held while a transaction gets its number. Without the lock, the transactions
        # of two threads could get the same number.
        self._mutex = Lock()

    @property
    def deciding(self) -> Session | None:
        """The session whose transaction has begun first. None if no transaction is open now.

        The first transaction has number 1. After a crash, an operator looks if number 1 is still
        prepared on the server. If it is, all transactions of the unit of work must be rolled back.
        Otherwise all transactions that are still prepared must be committed.
        """
        begun = self._begun
        return begun[0] if any(each.in_transaction() for each in begun) else None

    def connect(self, session: Any, engine: Engine) -> Connection:
        """Return a new connection for a session, whose next two-phase transaction gets a name.

        By this name, an operator finds the transaction (see `Names`). The name contains a number. A
        session has only one number, so only its first connection gets such a name. For further
        connections of the session (SQLAlchemy's option `binds`), SQLAlchemy makes a random name.
        """
        if session._companion.open_connections:
            return engine.connect()
        name = self._name(session)
        connection = engine.connect()

        def begin_named() -> TwoPhaseTransaction:
            del vars(connection)["begin_twophase"]
            return connection.begin_twophase(name)

        vars(connection)["begin_twophase"] = begin_named
        return connection

    def _name(self, session: Session) -> str:
        """Return the name (in MariaDB the `xid`) for the next two-phase transaction of a session.

        The name has at most 64 bytes, which is the limit of MariaDB. PostgreSQL allows 199 bytes.
        """
        with self._mutex:
            if not any(each.in_transaction() for each in self._begun if each is not session):
                self.renew()
            # Number the sessions in the order in which they begin their transactions. MariaDB needs
            # the name of a transaction, with this number, before the first statement. At that time,
            # nobody knows which other sessions of the unit of work will begin a transaction.
            if session not in self._begun:
                self._begun.append(session)
            number = self._begun.index(session) + 1
            return f"{_PREFIX}{self._unit}_{number}_{self._databases}"

    def renew(self) -> None:
        """Use a new random text in the names of all later two-phase transactions.

        An earlier transaction may still be prepared on the server. A later transaction must not get
        the same name.
        """
        self._begun = []
        self._unit = token_hex(16)
