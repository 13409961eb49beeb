"""An SQLAlchemy dialect for tests, in which each transaction is only a savepoint."""

import types
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import PoolProxiedConnection
from typing_extensions import override

from asgi_dbsession.session.read_only import may_only_read

from .pool import SharedRecord


class SavepointDialect(Dialect):
    """A dialect for tests in which all transactions share one connection (of a `SharedPool`).

    On this connection, BEGIN, COMMIT and ROLLBACK set, release and roll back savepoints.
    """

    @override
    def do_begin(self, dbapi_connection: PoolProxiedConnection) -> None:
        if record := record_of(dbapi_connection):
            record.shared.begin(record.transaction)
        else:
            super().do_begin(dbapi_connection)

    @override
    def do_commit(self, dbapi_connection: PoolProxiedConnection) -> None:
        if record := record_of(dbapi_connection):
            record.shared.commit(record.transaction)
        else:
            super().do_commit(dbapi_connection)

    @override
    def do_rollback(self, dbapi_connection: PoolProxiedConnection) -> None:
        if record := record_of(dbapi_connection):
            record.shared.roll_back(record.transaction)
        else:
            super().do_rollback(dbapi_connection)

    @override
    def do_begin_twophase(self, connection: Connection, xid: Any) -> None:
        self.do_begin(connection.connection)

    @override
    def do_prepare_twophase(self, connection: Connection, xid: Any) -> None:
        if record := record_of(connection.connection):
            record.shared.prepare(record.transaction)

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
        with _executing(context, statement) as is_sent:
            if is_sent:
                super().do_execute(cursor, statement, parameters, context)

    @override
    def do_executemany(
        self, cursor: Any, statement: str, parameters: Any, context: Any = None
    ) -> None:
        with _executing(context, statement):
            super().do_executemany(cursor, statement, parameters, context)

    @override
    def do_execute_no_params(self, cursor: Any, statement: str, context: Any = None) -> None:
        with _executing(context, statement) as is_sent:
            if is_sent:
                super().do_execute_no_params(cursor, statement, context)

    def _set_connection_characteristics(
        self, connection: Connection, characteristics: Mapping[str, Any]
    ) -> None:
        """Ignore a new isolation level on the shared connection: it is in a transaction already."""
        dialect: Any = super()
        if record_of(connection.connection):
            known = dialect.connection_characteristics
            characteristics = {
                name: value
                for name, value in characteristics.items()
                if not known[name].transactional
            }
        dialect._set_connection_characteristics(connection, characteristics)


def with_savepoints(dialect: type[Dialect]) -> type[Dialect]:
    """Derive a dialect class from `SavepointDialect`, which replaces transactions by savepoints."""
    # Without the attribute `supports_statement_cache` in the derived class itself, SQLAlchemy does
    # not cache compiled statements.
    known = {"supports_statement_cache": dialect.supports_statement_cache}
    return types.new_class(
        dialect.__name__, (SavepointDialect, dialect), exec_body=lambda body: body.update(known)
    )


def record_of(connection: PoolProxiedConnection) -> SharedRecord | None:
    """Return the pool entry of a connection that all transactions of a test share, or None."""
    record = connection._connection_record
    return record if isinstance(record, SharedRecord) else None


def _executing(context: Any, statement: str) -> AbstractContextManager[bool]:
    record = record_of(context.root_connection.connection) if context else None
    if record is None:
        return nullcontext(True)
    read_only = may_only_read(context.root_connection)
    return record.shared.executing(record.transaction, statement, read_only=read_only)
