"""One connection on which every transaction is a savepoint, so that all can be rolled back."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import PoolProxiedConnection

from .condition import Condition
from .constraints import check_as_commit_would, send, violations
from .isolation import Isolation, NotIsolated
from .transaction import SavepointTransaction, current_caller

_NO_SUCH_SAVEPOINT = 1305  # the error number of MariaDB and MySQL
# Seconds to wait for a transaction that nothing but the test itself is likely to end.
_PATIENCE_WITH_THE_TEST = 0.8


class SharedConnection:
    """The one connection, and the open transactions on it, each inside of the one before.

    Args:
        connection: Inside a transaction that is never committed.
        dialect: The dialect of the engine.
        database: The URL that errors name.
        isolation: Of the block that the connection is for.
    """

    def __init__(
        self,
        connection: PoolProxiedConnection,
        dialect: Dialect,
        database: str,
        isolation: Isolation,
    ) -> None:
        self.connection: PoolProxiedConnection = connection
        self.lost: BaseException | None = None
        self._dialect = dialect
        self._error: type[Exception] = dialect.loaded_dbapi.Error
        self._database = database
        self._isolation = isolation
        self._open: list[SavepointTransaction] = []
        self._free = Condition(asynchronous=dialect.is_async, timeout=isolation.timeout)
        self._known = violations(connection, dialect)

    def begin(self, transaction: SavepointTransaction) -> None:
        """Wait until no transaction is open that this one has to wait for, and begin."""
        transaction.caller = current_caller()
        transaction.aborted = False

        def may_begin() -> bool:
            self.refuse_if_lost()
            return not self._open or transaction.may_begin_inside(self._open[-1])

        with self._alone(transaction, may_begin):
            below = self._open[-1] if self._open else None
            try:
                if below is not None and below.saved and not below.wrote:
                    # `below` has nothing to roll back yet. Without its savepoint, rolling it back
                    # later keeps what this transaction commits.
                    self._release(below)
                self._save(transaction)
            except self._error as error:
                if below is None or not below.saved:
                    self.lose(error)
                    raise
                # PostgreSQL has aborted `below`. On a connection of its own, this transaction
                # would not notice.
                self._undo(below)
                below.aborted = True
                self._save(transaction)
            self._open.append(transaction)

    @contextmanager
    def executing(self, transaction: SavepointTransaction, statement: str) -> Iterator[bool]:
        """Wait until no transaction is open inside of this one.

        Yields:
            Whether to send the statement at all.
        """
        self.refuse_if_lost()
        if transaction not in self._open:
            # SQLAlchemy's recipe for SQLite sends its own BEGIN just before ours.
            yield not statement.lstrip().upper().startswith("BEGIN")
            return
        with self._on_top(transaction):
            if transaction.aborted:
                raise self._dialect.loaded_dbapi.InternalError("the transaction is aborted")
            if not transaction.saved:
                self._save(transaction)
            reads = statement.lstrip().upper().startswith("SELECT")
            transaction.wrote = transaction.wrote or not reads
            yield True

    def prepare(self, transaction: SavepointTransaction) -> None:
        """Check what COMMIT checks."""
        with self._on_top(transaction):
            if transaction.wrote:
                check_as_commit_would(self.connection, self._dialect, self._known)

    def commit(self, transaction: SavepointTransaction) -> None:
        """Check what COMMIT checks, and keep the work until the end of the test."""
        with self._on_top(transaction):
            try:
                if transaction.wrote:
                    check_as_commit_would(self.connection, self._dialect, self._known)
                if transaction.saved:
                    self._release(transaction)
            except BaseException:
                self._undo(transaction)
                raise
            finally:
                if transaction in self._open:  # else all are gone, with the connection
                    self._open.remove(transaction)
            if self._open and (transaction.wrote or transaction.keeps):
                self._open[-1].keeps = True

    def roll_back(self, transaction: SavepointTransaction) -> None:
        """Roll the transaction back; do nothing if it has ended."""
        if transaction not in self._open:
            return
        with self._on_top(transaction):
            if transaction.saved and transaction.keeps and transaction.is_of_request:
                self._isolation.violations.append(
                    self._refusal(
                        f"What was committed inside of {transaction} was rolled back together with "
                        "it. On a connection of its own, it would have stayed."
                    )
                )
            self._undo(transaction)
            self._open.remove(transaction)

    def abandon(self, transaction: SavepointTransaction) -> None:
        """Roll back a transaction that nobody has ended, or else give the connection up."""
        try:
            self.roll_back(transaction)
        except BaseException as error:
            self.lose(error)
            if not isinstance(error, Exception):
                raise

    def lose(self, reason: BaseException) -> None:
        """Let nobody use the connection any more."""
        self.lost = self.lost or reason
        self._open.clear()
        self._free.wake()

    def end(self, reason: NotIsolated) -> AbstractContextManager[None]:
        """Refuse all that is still open from now on, and wait for the statement under way.

        Raises:
            TimeoutError: The statement goes on for longer than transactions wait for each other.
        """
        self.lose(reason)
        return self._free.alone(lambda: True)

    def refuse_if_lost(self) -> None:
        """Refuse callers that come too late.

        Raises:
            NotIsolated: The connection was lost, or the test has ended.
        """
        if isinstance(self.lost, NotIsolated):
            raise self.lost.with_traceback(None)
        if self.lost is not None:
            raise self._refusal(
                f"The connection was lost, and with it all work of this test: {self.lost}."
            ) from self.lost

    def _refusal(self, what: str) -> NotIsolated:
        return NotIsolated(self._database, what)

    def _save(self, transaction: SavepointTransaction) -> None:
        self._send(f"SAVEPOINT {transaction.name}")
        transaction.saved = True
        transaction.wrote = transaction.keeps = False

    def _release(self, transaction: SavepointTransaction) -> None:
        self._send(f"RELEASE SAVEPOINT {transaction.name}")
        transaction.saved = False

    def _undo(self, transaction: SavepointTransaction) -> None:
        if transaction.saved:
            self._send(f"ROLLBACK TO SAVEPOINT {transaction.name}")
            self._release(transaction)

    def _send(self, statement: str) -> None:
        try:
            send(self.connection, statement)
        except self._error as error:
            if _NO_SUCH_SAVEPOINT not in error.args:
                raise
            self.lose(error)
            raise self._refusal(
                "MariaDB has committed by itself, as it does at CREATE TABLE, TRUNCATE and the "
                "like, and nothing before that can be rolled back: do this before the test."
            ) from error

    def _on_top(self, transaction: SavepointTransaction) -> AbstractContextManager[None]:
        def is_on_top() -> bool:
            self.refuse_if_lost()
            top = self._open[-1]
            if top is not transaction and top.caller == current_caller():
                raise self._refusal(
                    f"A statement was sent in {transaction} while {top}, which began inside of "
                    "it, is still open."
                )
            return top is transaction

        return self._alone(transaction, is_on_top)

    @contextmanager
    def _alone(self, transaction: SavepointTransaction, when: Callable[[], bool]) -> Iterator[None]:
        entered = False
        top = self._open[-1] if self._open else None
        waits_for_engine = top is not None and top is not transaction and top.is_of_engine
        patience = _PATIENCE_WITH_THE_TEST if waits_for_engine else None
        try:
            with self._free.alone(when, patience):
                entered = True
                yield
        except TimeoutError:
            if entered:
                raise
            raise self._waited_in_vain(transaction, patience) from None

    def _waited_in_vain(
        self, transaction: SavepointTransaction, patience: float | None
    ) -> NotIsolated:
        top = self._open[-1] if self._open else "an operation"
        seconds = min(patience or self._isolation.timeout, self._isolation.timeout)
        what = f"For {seconds:g} seconds {transaction} has waited for {top} to end."
        if patience is None:
            return self._refusal(what)
        return NotIsolated(
            self._database,
            what,
            "The test has probably opened it with `Session(engine)` or `engine.connect()`: end it "
            "first, or open `database.begin()` in the test instead, once the client has started.",
        )
