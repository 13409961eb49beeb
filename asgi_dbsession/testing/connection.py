"""The one connection that all transactions of a test share. Each transaction is a savepoint."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import PoolProxiedConnection

from .condition import Condition
from .constraints import check_as_commit_would, violations
from .isolation import Isolation, NotIsolated
from .outer import MARK, UNDO, send_inside
from .read_only import refusing_writes
from .transaction import SavepointTransaction, current_caller

# How many seconds the application waits for a transaction that the test itself has opened. The
# wait is short, because it is probably in vain: the test is waiting for the application.
_LIMIT_FOR_THE_TEST = 0.8


class SharedConnection:
    """The shared connection of a test, and its open transactions, which are nested savepoints.

    Args:
        connection: A connection with an open transaction, which is never committed.
        dialect: The SQLAlchemy dialect of the engine.
        database: The URL of the database, for error texts.
        isolation: The timeout and the recorded errors of the test's `with rolled_back(...)` block.
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
        self._send(MARK)

    def begin(self, transaction: SavepointTransaction) -> None:
        """Begin a transaction of the application. In a test, each transaction is a savepoint."""
        transaction.caller = current_caller()
        transaction.aborted = False

        def may_begin() -> bool:
            self.refuse_if_lost()
            return not self._open or transaction.may_begin_inside(self._open[-1])

        with self._alone(transaction, may_begin):
            below = self._open[-1] if self._open else None
            try:
                if below is not None and below.saved and not below.acted:
                    # Release the savepoint of the outer transaction `below`, which has written
                    # nothing. Otherwise a rollback of `below` would undo the new transaction too,
                    # even after its commit. The next statement of `below` sets the savepoint again.
                    self._release(below)
                self._save(transaction)
            except self._error as error:
                if below is None or not below.saved:
                    self.lose(error)
                    raise
                # Roll back the outer transaction `below`. A statement in it has failed, and
                # PostgreSQL then accepts no new savepoint. The new transaction must begin anyway:
                # outside of tests, it has a connection of its own, where the error has no effect.
                self._undo(below)
                below.aborted = True
                self._save(transaction)
            self._open.append(transaction)

    @contextmanager
    def executing(
        self, transaction: SavepointTransaction, statement: str, *, read_only: bool
    ) -> Iterator[bool]:
        """Wait until `transaction` can send `statement`. The `with` block then sends it.

        `statement` waits while an inner savepoint is open, because a rollback of that savepoint
        would undo `statement` too.

        Yields:
            False if the `with` block must not send `statement`: a listener for SQLAlchemy's event
            `begin` sends BEGIN, but the shared connection has an open transaction already.
        """
        self.refuse_if_lost()
        if transaction not in self._open:
            yield not statement.lstrip().upper().startswith("BEGIN")
            return
        with self._on_top(transaction):
            if transaction.aborted:
                raise self._dialect.loaded_dbapi.InternalError("the transaction is aborted")
            if not transaction.saved:
                self._save(transaction)
            if read_only:
                with refusing_writes(self.connection, self._dialect, transaction):
                    yield True
                return
            transaction.record(statement)
            yield True

    def prepare(self, transaction: SavepointTransaction) -> None:
        """Check the deferred constraints, as the database does before COMMIT."""
        with self._on_top(transaction):
            if transaction.wrote:
                check_as_commit_would(self.connection, self._dialect, self._known)

    def commit(self, transaction: SavepointTransaction) -> None:
        """Check deferred constraints as COMMIT does. Send no COMMIT, so the test can roll back."""
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
                if transaction in self._open:  # A lost connection has no open transactions.
                    self._open.remove(transaction)
            if self._open and (transaction.wrote or transaction.keeps):
                self._open[-1].keeps = True

    def roll_back(self, transaction: SavepointTransaction) -> None:
        """Roll back the transaction, unless it has ended already."""
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
        """Roll back a transaction that is still open. If this fails, mark the connection lost."""
        try:
            self.roll_back(transaction)
        except BaseException as error:
            self.lose(error)
            if not isinstance(error, Exception):
                raise

    def lose(self, reason: BaseException) -> None:
        """Mark the connection as lost. From now on, each use of it raises an error."""
        self.lost = self.lost or reason
        self._open.clear()
        self._free.wake()

    def end(self, reason: NotIsolated) -> AbstractContextManager[None]:
        """Let all later statements on the shared connection raise the error `reason`.

        Use the result in a `with` statement, which first waits until no statement runs, or raises
        TimeoutError. Inside the `with` block, it is safe to return the connection to its pool.
        """
        self.lose(reason)
        return self._free.alone(lambda: True)

    def undo(self) -> None:
        """Roll back all work of the test. If its outer transaction has ended, record an error."""
        with suppress(NotIsolated, self._error):
            self._send(UNDO)

    def refuse_if_lost(self) -> None:
        """Raise NotIsolated if the connection was lost or the test has ended."""
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
        transaction.wrote = transaction.acted = False
        transaction.keeps = transaction.read_only = False

    def _release(self, transaction: SavepointTransaction) -> None:
        self._send(f"RELEASE SAVEPOINT {transaction.name}")
        transaction.saved = False

    def _undo(self, transaction: SavepointTransaction) -> None:
        if transaction.saved:
            self._send(f"ROLLBACK TO SAVEPOINT {transaction.name}")
            self._release(transaction)

    def _send(self, statement: str) -> None:
        try:
            send_inside(self.connection, self._dialect, self._database, statement)
        except NotIsolated as error:
            self._isolation.violations.append(error)
            self.lose(error)
            raise

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
        limit = _LIMIT_FOR_THE_TEST if waits_for_engine else None
        try:
            with self._free.alone(when, limit):
                entered = True
                yield
        except TimeoutError:
            if entered:
                raise
            raise self._timed_out(transaction, limit) from None

    def _timed_out(self, transaction: SavepointTransaction, limit: float | None) -> NotIsolated:
        top = self._open[-1] if self._open else "an operation"
        seconds = min(limit or self._isolation.timeout, self._isolation.timeout)
        what = f"For {seconds:g} seconds {transaction} has waited for {top} to end."
        if limit is None:
            return self._refusal(what)
        return NotIsolated(
            self._database,
            what,
            "The test has probably opened it with `Session(engine)` or `engine.connect()`: end it "
            "first, or open `database.begin()` in the test instead, once the client has started.",
        )
