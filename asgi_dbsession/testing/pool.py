"""A connection pool for tests, in which each checkout gets the same connection."""

import asyncio
from itertools import count
from typing import Any, NoReturn
from weakref import WeakSet

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection
from sqlalchemy.pool.base import _ConnectionRecord
from typing_extensions import override

from .condition import Condition
from .connection import SharedConnection
from .constraints import send
from .isolation import Isolation, disposed, outlived
from .transaction import SavepointTransaction


class SharedPool(Pool):
    """A connection pool for tests, in which each checkout gets the same connection.

    Args:
        source: The engine's own pool, which opens the connection.
        dialect: The SQLAlchemy dialect of the engine.
        database: The URL of the database, for error texts.
        isolation: The data of the test's `with rolled_back(...)` block.
    """

    def __init__(self, source: Pool, dialect: Dialect, database: str, isolation: Isolation) -> None:
        super().__init__(
            source._creator,
            dialect=dialect,
            reset_on_return=source._reset_on_return,
            _dispatch=source.dispatch,
        )
        self.source: Pool = source
        self.loop: asyncio.AbstractEventLoop | None = None
        self._for_dialect = dialect
        self._database = database
        self.isolation = isolation
        self._shared: SharedConnection | None = None
        self._opening = Condition(asynchronous=dialect.is_async, timeout=isolation.timeout)
        self._numbers = count(1)
        self._out: WeakSet[SharedRecord] = WeakSet()

    def checkedout(self) -> int:
        """Return how many checkouts are open now. All of them have the same connection."""
        return len(self._out)

    @override
    def status(self) -> str:
        return f"One connection, shared by {self.checkedout()}"

    @override
    def recreate(self) -> Pool:
        source = self.source.recreate()
        return SharedPool(source, self._for_dialect, self._database, self.isolation)

    @override
    def dispose(self) -> None:
        self.roll_back()
        self.source.dispose()

    def roll_back(self) -> None:
        """Roll back all work of the test, and return its connection to the pool that opened it.

        All code of the test has used this one connection. Code that uses it later gets an error.
        """
        shared, self._shared = self._shared, None
        if shared is None:
            return
        was_lost = shared.lost is not None
        reason = (outlived if self.isolation.has_ended else disposed)(self._database)
        try:
            with shared.end(reason):
                self._cut_off(reason)
                if not was_lost:
                    self._give_back(shared)
        finally:
            self._cut_off(reason)
            if shared.connection.is_valid:
                # The connection could not be returned to its pool. Close it, so that the database
                # rolls back.
                shared.connection.invalidate(shared.lost)

    def _give_back(self, shared: SharedConnection) -> None:
        shared.undo()
        self._for_dialect.do_rollback(shared.connection)
        if _is_autocommit(self._for_dialect):
            self._for_dialect.reset_isolation_level(_dbapi(shared.connection))
        shared.connection.close()

    def _cut_off(self, reason: Exception) -> None:
        for record in list(self._out):
            record.cut_off(reason)

    @override
    def _do_get(self) -> ConnectionPoolEntry:
        if self.isolation.has_ended:
            raise outlived(self._database)
        with self._opening.alone(lambda: True):
            shared = self._shared = self._shared or self._open()
        shared.refuse_if_lost()
        number = next(self._numbers)
        record = SharedRecord(self, shared, SavepointTransaction(number, self.isolation.test))
        self._out.add(record)
        return record

    @override
    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if isinstance(record, SharedRecord):
            self._out.discard(record)
            record.shared.abandon(record.transaction)

    @override
    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        """Do nothing: the shared connection stays open, because other code may be using it."""

    def _open(self) -> SharedConnection:
        dialect = self._for_dialect
        if dialect.is_async:
            self.loop = asyncio.get_running_loop()
        connection = self.source.connect()
        if _is_autocommit(dialect):
            level = dialect.default_isolation_level or "SERIALIZABLE"
            dialect.set_isolation_level(_dbapi(connection), level)
        driver: Any = connection.driver_connection
        if dialect.name == "sqlite" and not driver.in_transaction:
            # On SQLite, the release of a savepoint outside of a transaction is a COMMIT. So begin a
            # transaction.
            send(connection, "BEGIN")
        return SharedConnection(connection, dialect, self._database, self.isolation)


class SharedRecord(_ConnectionRecord):
    """The pool entry of one checkout from a `SharedPool`, a connection pool for tests.

    All entries of the pool have the same connection, which all code of the test shares.
    """

    def __init__(
        self, pool: Pool, shared: SharedConnection, transaction: SavepointTransaction
    ) -> None:
        super().__init__(pool, connect=False)
        self.dbapi_connection = shared.connection.dbapi_connection
        self.shared = shared
        self.transaction = transaction

    def cut_off(self, reason: Exception) -> None:
        """Take the connection away from the code that has checked it out. Each use then fails.

        Called at the end of a test, or when the engine is disposed. A task that the test has
        started may still be running then, and must not use the connection any more.

        Args:
            reason: The error to raise.
        """
        connection: Any = CutOffConnection(reason)
        self.dbapi_connection = connection
        proxy: Any = self.fairy_ref() if self.fairy_ref is not None else None
        if proxy is not None:
            proxy.dbapi_connection = connection


class CutOffConnection:
    """Replaces the driver's connection after the end of the test.

    Args:
        reason: The error to raise at each use.
    """

    def __init__(self, reason: Exception) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> NoReturn:
        raise self._reason.with_traceback(None)

    def cursor(self, *_: object, **__: object) -> "CutOffCursor":
        """Return a cursor that raises the error `reason` at each statement, and can be closed."""
        return CutOffCursor(self._reason)

    def rollback(self) -> None:
        """Do nothing, because all work was rolled back when the test ended."""

    def close(self) -> None:
        """Do nothing, because this object has no connection of the driver to close."""


class CutOffCursor:
    """Replaces the driver's cursor after the end of the test: each statement raises an error."""

    def __init__(self, reason: Exception) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> NoReturn:
        raise self._reason.with_traceback(None)

    def close(self) -> None:
        """Do nothing, because this object has no cursor of the driver that could be closed."""


def _is_autocommit(dialect: Any) -> bool:
    """Return True if the engine switches each new connection to AUTOCOMMIT."""
    return bool(dialect._on_connect_isolation_level == "AUTOCOMMIT")


def _dbapi(connection: PoolProxiedConnection) -> Any:
    return connection.dbapi_connection
