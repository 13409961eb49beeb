"""One connection on which every transaction is a savepoint, so that all of them can be undone."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import PoolProxiedConnection

from asgi_dbsession.errors import DBSessionError
from asgi_dbsession.session.lock import current_task
from asgi_dbsession.unit.unit_of_work import UnitOfWork, current_unit

from .condition import Condition
from .constraints import check_as_commit_would, send, violations

_NO_SUCH_SAVEPOINT = 1305  # MariaDB's and MySQL's number for it


class NotIsolated(DBSessionError, RuntimeError):
    """One connection cannot do what several would have done."""

    def __init__(self, database: str, what: str) -> None:
        super().__init__(
            f"{what} Inside `rolled_back`, all transactions on {database} take turns on one "
            "connection: test what needs several at once on a database of its own, without it."
        )


class Nested:
    """A transaction of the application's: a savepoint on the shared connection.

    Args:
        number: Makes the name of its savepoint.

    Attributes:
        unit: The unit of work that it belongs to; None for a connection of the engine's own.
        caller: The task or the thread that began it.
        saved: Whether its savepoint is there.
        wrote: Whether it did anything but SELECT since.
        keeps: Whether a transaction that began inside it has been committed since.
        aborted: Whether it can do nothing any more but roll back.
    """

    caller: object = None
    saved: bool = False
    wrote: bool = False
    keeps: bool = False
    aborted: bool = False

    def __init__(self, number: int) -> None:
        self.name: str = f"asgi_dbsession_{number}"
        self.unit: UnitOfWork | None = current_unit.get()

    def __str__(self) -> str:
        if self.unit is None or self.unit.scope is None:
            return "a transaction outside of any request"
        scope = self.unit.scope
        return f"the transaction of {scope.get('method', scope['type'])} {scope.get('path', '')}"

    @property
    def is_of_request(self) -> bool:
        """Whether it was begun while a request was served."""
        return self.unit is not None and self.unit.scope is not None

    def may_begin_inside(self, other: "Nested") -> bool:
        """Whether `other` would wait for this one, and so must not be waited for."""
        unit = self.unit
        while unit is not None:
            if unit is other.unit:
                return True
            unit = unit.enclosing
        if other.is_of_request:
            return False
        return self.is_of_request or self.caller == other.caller


class SharedConnection:
    """The one connection, and the transactions that are open on it, each inside the one before.

    Args:
        connection: Inside a transaction that nobody commits.
        dialect: Of its engine.
        database: What errors name.
        timeout: Seconds that a transaction waits for another one.
        falsified: Where it is noted what would have ended differently on several connections.
    """

    def __init__(
        self,
        connection: PoolProxiedConnection,
        dialect: Dialect,
        database: str,
        timeout: float,
        falsified: list[Exception],
    ) -> None:
        self.connection: PoolProxiedConnection = connection
        self.lost: BaseException | None = None
        self._dialect = dialect
        self._error: type[Exception] = dialect.loaded_dbapi.Error
        self._database = database
        self._falsified = falsified
        self._open: list[Nested] = []
        self._turns = Condition(asynchronous=dialect.is_async, timeout=timeout)
        self._known = violations(connection, dialect)

    def begin(self, nested: Nested) -> None:
        """Wait until no transaction is open that this one has to wait for, and begin."""
        nested.caller = _caller()
        nested.aborted = False
        with self._alone(nested, lambda: not self._open or nested.may_begin_inside(self._open[-1])):
            below = self._open[-1] if self._open else None
            try:
                if below is not None and below.saved and not below.wrote:
                    # Nothing to undo there: so its rollback need not undo what is stored now.
                    self._release(below)
                self._save(nested)
            except self._error as error:
                if below is None or not below.saved:
                    self.lose(error)
                    raise
                # PostgreSQL has aborted it, which is no matter to a connection of one's own.
                self._undo(below)
                below.aborted = True
                self._save(nested)
            self._open.append(nested)

    @contextmanager
    def executing(self, nested: Nested, statement: str) -> Iterator[bool]:
        """Wait until no transaction is open inside this one.

        Yields:
            Whether to send the statement at all.
        """
        self.refuse_if_lost()
        if nested not in self._open:
            # A recipe of SQLAlchemy's for SQLite sends BEGIN by itself, just before ours.
            yield not statement.lstrip().upper().startswith("BEGIN")
            return
        with self._on_top(nested):
            if nested.aborted:
                raise self._dialect.loaded_dbapi.InternalError("the transaction is aborted")
            if not nested.saved:
                self._save(nested)
            nested.wrote = nested.wrote or not statement.lstrip().upper().startswith("SELECT")
            yield True

    def prepare(self, nested: Nested) -> None:
        """Check what COMMIT checks."""
        with self._on_top(nested):
            if nested.wrote:
                check_as_commit_would(self.connection, self._dialect, self._known)

    def commit(self, nested: Nested) -> None:
        """Check what COMMIT checks, and keep what was done until the end of the test."""
        with self._on_top(nested):
            try:
                if nested.wrote:
                    check_as_commit_would(self.connection, self._dialect, self._known)
                if nested.saved:
                    self._release(nested)
            except BaseException:
                self._undo(nested)
                raise
            finally:
                if nested in self._open:  # else all are gone, with the connection
                    self._open.remove(nested)
            if self._open and (nested.wrote or nested.keeps):
                self._open[-1].keeps = True

    def roll_back(self, nested: Nested) -> None:
        """Undo what it did; nothing, if it is over."""
        if nested not in self._open:
            return
        with self._on_top(nested):
            if nested.saved and nested.keeps and nested.is_of_request:
                self._falsified.append(
                    self.refusal(
                        f"What was committed inside of {nested} went when that rolled back, and "
                        "would have stayed on a connection of its own."
                    )
                )
            self._undo(nested)
            self._open.remove(nested)

    def abandon(self, nested: Nested) -> None:
        """Undo what nobody has ended, or else give the connection up."""
        try:
            self.roll_back(nested)
        except BaseException as error:
            self.lose(error)
            if not isinstance(error, Exception):
                raise

    def lose(self, reason: BaseException) -> None:
        """Let nobody use the connection any more."""
        self.lost = self.lost or reason
        self._open.clear()
        self._turns.wake()

    def refuse_if_lost(self) -> None:
        """Refuse whoever comes too late.

        Raises:
            NotIsolated: The connection was lost.
        """
        if self.lost is not None:
            raise self.refusal(
                f"The connection was lost, and with it all of this test: {self.lost}."
            ) from self.lost

    def refusal(self, what: str) -> NotIsolated:
        """An error to raise."""
        return NotIsolated(self._database, what)

    def _save(self, nested: Nested) -> None:
        self._send(f"SAVEPOINT {nested.name}")
        nested.saved = True
        nested.wrote = nested.keeps = False

    def _release(self, nested: Nested) -> None:
        self._send(f"RELEASE SAVEPOINT {nested.name}")
        nested.saved = False

    def _undo(self, nested: Nested) -> None:
        if nested.saved:
            self._send(f"ROLLBACK TO SAVEPOINT {nested.name}")
            self._release(nested)

    def _send(self, statement: str) -> None:
        try:
            send(self.connection, statement)
        except self._error as error:
            if _NO_SUCH_SAVEPOINT not in error.args:
                raise
            self.lose(error)
            raise self.refusal(
                "MariaDB has committed by itself, as it does at CREATE TABLE, TRUNCATE and "
                "the like, and nothing before that can be rolled back: do this before the test."
            ) from error

    def _on_top(self, nested: Nested) -> AbstractContextManager[None]:
        def is_on_top() -> bool:
            self.refuse_if_lost()
            top = self._open[-1]
            if top is not nested and top.caller == _caller():
                raise self.refusal(
                    f"There is work on {nested} while another one, begun inside of it, is open."
                )
            return top is nested

        return self._alone(nested, is_on_top)

    @contextmanager
    def _alone(self, nested: Nested, when: Callable[[], bool]) -> Iterator[None]:
        entered = False
        try:
            with self._turns.alone(when):
                entered = True
                yield
        except TimeoutError:
            if entered:
                raise
            top = self._open[-1] if self._open else "an operation"
            raise self.refusal(
                f"For {self._turns.timeout} seconds {nested} has waited for {top} to end."
            ) from None


def _caller() -> object:
    return current_task() or get_ident()
