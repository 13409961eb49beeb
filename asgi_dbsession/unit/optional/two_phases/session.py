"""A session whose transaction is committed in two phases: PREPARE, and then COMMIT."""

from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.engine import TwoPhaseTransaction
from sqlalchemy.exc import DBAPIError
from typing_extensions import override

from asgi_dbsession.errors import TransactionAborted, without_secrets
from asgi_dbsession.session.end import End
from asgi_dbsession.session.failures import refuse_if_aborted
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.roll_back import roll_back

from .names import Names

S = TypeVar("S")

# After these errors, nobody knows if the server has received PREPARE. `_UNKNOWN` has the SQLSTATE
# classes of a lost connection and of a server shutdown. `_CLIENT_ERRORS` has the error numbers of
# MariaDB's client library.
_UNKNOWN = ("08", "57")
_CLIENT_ERRORS = range(2000, 3000)


class TwoPhaseSession(ManagedSession[S]):
    """A session whose transactions can be prepared before they are committed.

    Args:
        opened: The session, which no other code uses yet.
        names: Gives names to the transactions of the session.

    Attributes:
        in_doubt: The names of transactions that may still be prepared on the server, as a text.
            Empty if there are none.
    """

    in_doubt: str = ""

    def __init__(self, opened: ManagedSession[S], names: Names) -> None:
        super().__init__(opened.session, opened.orm, opened.companion, opened.run)
        self.orm.twophase = True
        self.companion.connect = names.connect

    @override
    def _flush(self) -> None:
        # Begin a transaction if none is open, because PREPARE (the first phase of a two-phase
        # commit) needs one. The first session of a request is prepared even if this session has no
        # work. After a crash, its transaction tells an operator what to do with the others.
        self.orm.connection()
        # With SQLAlchemy's option `binds`, this flush may begin transactions on further engines.
        # `twophase` must be True meanwhile, so that PREPARE can be sent for these too.
        refuse_if_aborted(self.companion.open_connections)
        self.orm.flush()
        # At the end of this flush, SQLAlchemy must not send PREPARE. The method `prepare` sends it
        # after the flushes of all databases.
        try:
            self.orm.twophase = False
            super()._flush()
        finally:
            self.orm.twophase = True

    def prepare(self) -> None:
        """Send PREPARE, the first phase of a two-phase commit. COMMIT is the second phase.

        Afterwards, the caller must call `end` or `leave_in_doubt`, even if PREPARE failed. Until
        then, the session keeps its connection and its lock, and other tasks cannot use the session.

        Raises:
            TransactionAborted: The application caught an error that aborted the transaction.
            Exception: The error of PREPARE.
        """
        connections = self.companion.open_connections
        self.in_doubt = _names_of(connections)
        try:
            for connection in connections:
                transaction = connection.get_transaction()
                if isinstance(transaction, TwoPhaseTransaction):
                    transaction.prepare()
        except BaseException as error:
            if is_refused(error) and len(connections) == 1:
                self.in_doubt = ""
            raise

    @override
    def end(self, end: End, commit: bool) -> None:
        if not (self.is_flushed and self.in_doubt):
            super().end(end, commit)
            return
        try:
            if commit:
                self.orm.commit()
                self.in_doubt = ""
            else:
                is_lost = any(each.invalidated for each in self.companion.open_connections)
                if roll_back(self.orm) and not is_lost:
                    self.in_doubt = ""
                self.companion.rolled_back(end.reason)
        except BaseException:
            if self.in_doubt:
                # A listener of the application may have raised this error after a successful
                # COMMIT. So find out which transactions are still prepared.
                self.in_doubt = _names_of(self.companion.open_connections)
            # If the transaction may be prepared, close the connection without ROLLBACK. The server
            # then keeps the prepared transaction until an operator ends it. Another database of
            # the same request may have committed already, so a ROLLBACK could be wrong.
            if self.in_doubt:
                self.orm.invalidate()
            else:
                roll_back(self.orm)
            raise
        finally:
            self._release(end)

    def leave_in_doubt(self, end: End) -> None:
        """Close the connection. Its prepared transaction stays until an operator ends it."""
        try:
            self.orm.invalidate()
        finally:
            self._release(end)


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


def _names_of(connections: Sequence[Connection]) -> str:
    """Return the two-phase transactions of the connections as text, each `NAME on DATABASE`."""
    transactions = ((each.get_transaction(), each.engine.url) for each in connections)
    return ", ".join(
        f"{transaction.xid} on {without_secrets(url)}"
        for transaction, url in transactions
        if isinstance(transaction, TwoPhaseTransaction)
    )
