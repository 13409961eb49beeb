"""How an engine comes to share one connection, and how it gets its own ones back."""

import asyncio
import types
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection
from sqlalchemy.pool.base import _ConnectionRecord
from typing_extensions import override

from asgi_dbsession.errors import ConfigurationError, without_secrets

from .condition import Condition
from .connection import Nested, SharedConnection
from .constraints import send


def share(engine: Engine, timeout: float, falsified: list[Exception]) -> None:
    """Have all transactions of an engine take turns on one connection, inside one that is undone.

    Nothing is connected yet. The connection will come from the engine's own pool, with all that
    its events make of one.

    Args:
        engine: Changed in place, as others hold it too.
        timeout: Seconds that a transaction waits for another one.
        falsified: Where it is noted what would have ended differently on several connections.

    Raises:
        ConfigurationError: It does so already.
    """
    dialect = engine.dialect
    name = without_secrets(engine.url)
    if isinstance(dialect, _SavepointDialect):
        raise ConfigurationError(
            f"{name} is inside of `rolled_back` already: use it once for each test."
        )
    dialect.__class__ = _by_savepoints(type(dialect))
    engine.pool = SharedPool(engine.pool, dialect, name, timeout, falsified)


def unshare(engine: Engine) -> None:
    """Undo all that was done, and the sharing."""
    pool, dialect = engine.pool, engine.dialect
    if isinstance(pool, SharedPool):
        try:
            pool.roll_back()
        finally:
            engine.pool = pool.source
            dialect.__class__ = type(dialect).__bases__[1]


def home_of(engine: Engine) -> asyncio.AbstractEventLoop | None:
    """The event loop that the shared connection belongs to, if it belongs to one."""
    return engine.pool.loop if isinstance(engine.pool, SharedPool) else None


class SharedPool(Pool):
    """Gives the same connection to everybody.

    Args:
        source: The pool that it comes from.
        dialect: Of the engine.
        database: What errors name.
        timeout: Seconds that a transaction waits for another one.
        falsified: Where it is noted what would have ended differently on several connections.
    """

    def __init__(
        self,
        source: Pool,
        dialect: Dialect,
        database: str,
        timeout: float,
        falsified: list[Exception],
    ) -> None:
        super().__init__(
            source._creator,
            dialect=dialect,
            reset_on_return=source._reset_on_return,
            _dispatch=source.dispatch,
        )
        self.source: Pool = source
        self.loop: asyncio.AbstractEventLoop | None = None
        self._for_dialect = dialect
        self._options = (database, timeout, falsified)
        self._shared: SharedConnection | None = None
        self._opening = Condition(asynchronous=dialect.is_async, timeout=timeout)
        self._numbers = count(1)
        self._checked_out = 0

    def checkedout(self) -> int:
        """How many connections there would be, if it were not one."""
        return self._checked_out

    @override
    def status(self) -> str:
        return f"One connection, shared by {self._checked_out}"

    @override
    def recreate(self) -> Pool:
        return SharedPool(self.source.recreate(), self._for_dialect, *self._options)

    @override
    def dispose(self) -> None:
        self.roll_back()
        self.source.dispose()

    def roll_back(self) -> None:
        """Undo all that was done, and give the connection back."""
        shared, self._shared = self._shared, None
        if shared is None:
            return
        is_lost = shared.lost is not None
        shared.lose(RuntimeError("the test is over"))
        try:
            if not is_lost:
                self._for_dialect.do_rollback(shared.connection)
                if _is_autocommit(self._for_dialect):
                    self._for_dialect.reset_isolation_level(_dbapi(shared.connection))
                shared.connection.close()
        finally:
            if shared.connection.is_valid:
                # Without it, the database rolls back by itself.
                shared.connection.invalidate(shared.lost)

    @override
    def _do_get(self) -> ConnectionPoolEntry:
        with self._opening.alone(lambda: True):
            shared = self._shared = self._shared or self._open()
        shared.refuse_if_lost()
        self._checked_out += 1
        return _Share(self, shared, Nested(next(self._numbers)))

    @override
    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self._checked_out -= 1
        if isinstance(record, _Share):
            record.shared.abandon(record.nested)

    @override
    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        """Leave it to the others: returning the share undoes what was done."""

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
            # Otherwise the release of a savepoint would be a COMMIT.
            send(connection, "BEGIN")
        return SharedConnection(connection, dialect, *self._options)


class _Share(_ConnectionRecord):
    """What looks like a connection of one's own."""

    def __init__(self, pool: Pool, shared: SharedConnection, nested: Nested) -> None:
        super().__init__(pool, connect=False)
        self.dbapi_connection = shared.connection.dbapi_connection
        self.shared = shared
        self.nested = nested


class _SavepointDialect(Dialect):
    """Begins, commits and rolls back by savepoints on what comes from a `SharedPool`."""

    @override
    def do_begin(self, dbapi_connection: PoolProxiedConnection) -> None:
        if share := _share_of(dbapi_connection):
            share.shared.begin(share.nested)
        else:
            super().do_begin(dbapi_connection)

    @override
    def do_commit(self, dbapi_connection: PoolProxiedConnection) -> None:
        if share := _share_of(dbapi_connection):
            share.shared.commit(share.nested)
        else:
            super().do_commit(dbapi_connection)

    @override
    def do_rollback(self, dbapi_connection: PoolProxiedConnection) -> None:
        if share := _share_of(dbapi_connection):
            share.shared.roll_back(share.nested)
        else:
            super().do_rollback(dbapi_connection)

    @override
    def do_begin_twophase(self, connection: Connection, xid: Any) -> None:
        self.do_begin(connection.connection)

    @override
    def do_prepare_twophase(self, connection: Connection, xid: Any) -> None:
        if share := _share_of(connection.connection):
            share.shared.prepare(share.nested)

    @override
    def do_rollback_twophase(
        self, connection: Connection, xid: Any, is_prepared: bool = True, recover: bool = False
    ) -> None:
        self.do_rollback(connection.connection)

    @override
    def do_commit_twophase(
        self, connection: Connection, xid: Any, is_prepared: bool = True, recover: bool = False
    ) -> None:
        self.do_commit(connection.connection)

    @override
    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        with _turn(context, statement) as is_sent:
            if is_sent:
                super().do_execute(cursor, statement, parameters, context)

    @override
    def do_executemany(
        self, cursor: Any, statement: str, parameters: Any, context: Any = None
    ) -> None:
        with _turn(context, statement):
            super().do_executemany(cursor, statement, parameters, context)

    @override
    def do_execute_no_params(self, cursor: Any, statement: str, context: Any = None) -> None:
        with _turn(context, statement) as is_sent:
            if is_sent:
                super().do_execute_no_params(cursor, statement, context)

    def _set_connection_characteristics(
        self, connection: Connection, characteristics: Mapping[str, Any]
    ) -> None:
        """Leave out the isolation level and the like: the transaction has begun long ago."""
        dialect: Any = super()
        if _share_of(connection.connection):
            known = dialect.connection_characteristics
            characteristics = {
                name: value
                for name, value in characteristics.items()
                if not known[name].transactional
            }
        dialect._set_connection_characteristics(connection, characteristics)


def _by_savepoints(dialect: type[Dialect]) -> type[Dialect]:
    # SQLAlchemy takes it for a dialect of somebody else's that may not know of the cache.
    known = {"supports_statement_cache": dialect.supports_statement_cache}
    return types.new_class(
        dialect.__name__, (_SavepointDialect, dialect), exec_body=lambda body: body.update(known)
    )


def _share_of(connection: PoolProxiedConnection) -> _Share | None:
    record = connection._connection_record
    return record if isinstance(record, _Share) else None


def _turn(context: Any, statement: str) -> AbstractContextManager[bool]:
    share = _share_of(context.root_connection.connection) if context else None
    return share.shared.executing(share.nested, statement) if share else nullcontext(True)


def _is_autocommit(dialect: Any) -> bool:
    return bool(dialect._on_connect_isolation_level == "AUTOCOMMIT")


def _dbapi(connection: PoolProxiedConnection) -> Any:
    return connection.dbapi_connection
