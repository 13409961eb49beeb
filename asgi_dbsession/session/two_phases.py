"""Names the transactions of a two-phase commit, so that an operator can end them after a crash."""

import logging
from collections.abc import Sequence
from secrets import token_hex
from threading import Lock
from typing import Any

from sqlalchemy import URL, Connection
from sqlalchemy.engine import TwoPhaseTransaction
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from asgi_dbsession.errors import ConfigurationError, TransactionAborted, without_secrets

_logger = logging.getLogger("asgi_dbsession")

_PREFIX = "asgi_dbsession_"
# After these errors, nobody knows if the server has received PREPARE. `_UNKNOWN` has the SQLSTATE
# classes of a lost connection and of a server shutdown. `_CLIENT_ERRORS` has the error numbers of
# MariaDB's client library.
_UNKNOWN = ("08", "57")
_CLIENT_ERRORS = range(2000, 3000)


class TwoPhases:
    """Gives names to the two-phase transactions of one unit of work, before they begin.

    A name has three parts: a random text, which is the same for all transactions of the unit of
    work; the number of the transaction; and how many databases the unit of work has.

    Transaction number 1 is prepared first, committed first, and rolled back last. So after a crash,
    number 1 tells an operator what to do with the other prepared transactions of the unit of work.
    If number 1 is still prepared too, roll back all of them, and number 1 last. If number 1 is not
    prepared any more, it was committed, so commit all others.

    MariaDB needs the name before the first statement of a transaction. At that time nobody knows
    which other sessions the unit of work will open. So number 1 is the transaction that begins
    first.

    Args:
        databases: How many databases the unit of work has.
    """

    def __init__(self, databases: int) -> None:
        self._databases = databases
        self._begun: list[Session] = []
        self._unit = token_hex(16)
        self._mutex = Lock()  # A lock, because several threads may begin transactions at once.

    @property
    def deciding(self) -> Session | None:
        """The session whose transaction began first; None if no transaction is open now."""
        begun = self._begun
        return begun[0] if any(each.in_transaction() for each in begun) else None

    def name(self, session: Session) -> str:
        """Return the name for the next transaction of a session.

        The name has at most 64 bytes, which is the limit of MariaDB. PostgreSQL allows 199 bytes.
        """
        with self._mutex:
            if not any(each.in_transaction() for each in self._begun if each is not session):
                self.renew()
            if session not in self._begun:
                self._begun.append(session)
            number = self._begun.index(session) + 1
            return f"{_PREFIX}{self._unit}_{number}_{self._databases}"

    def renew(self) -> None:
        """Use a new random text in all names from now on.

        If an earlier transaction may still be prepared on the server, a later transaction must not
        get the same name.
        """
        self._begun = []
        self._unit = token_hex(16)


def refuse_one_phase(database: object, url: URL) -> None:
    """Raise an error if a database does not support two-phase commit.

    Raises:
        ConfigurationError: The SQLAlchemy dialect of the database has no two-phase commit.
    """
    if url.get_dialect().do_begin_twophase is Dialect.do_begin_twophase:
        raise ConfigurationError(
            f"{database} cannot commit in two phases. Leave out `two_phase=True`, or give this "
            "database to a DBSessionMiddleware of its own without it."
        )


def prepare(connection: Connection) -> None:
    """Send PREPARE on a connection if its transaction uses two-phase commit."""
    transaction = connection.get_transaction()
    if isinstance(transaction, TwoPhaseTransaction):
        transaction.prepare()


def is_refused(error: BaseException) -> bool:
    """Return True if the error of PREPARE shows that the transaction was certainly not prepared."""
    if isinstance(error, TransactionAborted):
        return True
    original: Any = error.orig if isinstance(error, DBAPIError) else None
    state = getattr(original, "sqlstate", None)
    if isinstance(state, str):
        return not state.startswith(_UNKNOWN)
    number = original.args[0] if original is not None and original.args else None
    return isinstance(number, int) and number not in _CLIENT_ERRORS


def names_of(connections: Sequence[Connection]) -> str:
    """Return the two-phase transactions of the connections as text, each `NAME on DATABASE`."""
    transactions = ((each.get_transaction(), each.engine.url) for each in connections)
    return ", ".join(
        f"{transaction.xid} on {without_secrets(url)}"
        for transaction, url in transactions
        if isinstance(transaction, TwoPhaseTransaction)
    )


def log_doubt(transactions: str, error: BaseException) -> None:
    """Log the names of transactions that may still be prepared; an operator must end them."""
    _logger.error("In doubt: %s", transactions, exc_info=error)
