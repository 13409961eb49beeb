"""Switches connections to MariaDB or MySQL between autocommit mode and transactions.

A connection that has only read stays in autocommit mode, also while it is in the pool. All other
users of the connection (a write, SQL text, `database.engine`) get it with autocommit switched off,
as SQLAlchemy would give it to them: then the server itself begins each transaction.

BEGIN would not be safe here. After BEGIN, the server is in autocommit mode again as soon as the
transaction ends without COMMIT (by CREATE TABLE, a deadlock, or on the driver's own connection).
The next write would be stored, even if the request fails.
"""

import types
from threading import get_ident
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.pool import (
    ConnectionPoolEntry,
    ManagesConnection,
    PoolProxiedConnection,
    PoolResetState,
)
from typing_extensions import override

from asgi_dbsession.session.end import current_end
from asgi_dbsession.session.tasks import current_task

# Bits of the status that the server sends with each answer. The bit for a transaction is reliable
# only in autocommit mode. Source: https://mariadb.com/kb/en/ok_packet/
_IN_TRANSACTION, _AUTOCOMMIT = 1, 2
# The keys of `record_info`, a dictionary that belongs to a connection in the pool.
# `_READS`: This module has switched autocommit on, and only plain reads were sent since then.
# `_OWED`: This module has switched autocommit off, and must switch it on when the connection
# returns to the pool. The value is the `End` that has sent COMMIT or ROLLBACK last, or None.
# `_RETURNS`: The connection is returning to the pool now.
_READS, _OWED = "asgi_dbsession.reads", "asgi_dbsession.autocommit_owed"
_RETURNS = "asgi_dbsession.returns"

# Who waits in `connect_to_read` for a connection: the dialect, the task and the thread. (Not a
# `ContextVar`: a task that is started meanwhile, by a listener, would inherit its value.)
_readers: set[tuple[Dialect, object, int]] = set()


def watch_connections(engine: Engine) -> None:
    """Let an engine switch its connections to the mode that their users need."""
    engine.dialect.__class__ = _with_reads(type(engine.dialect))
    dialect: Any = engine.dialect
    event.listen(engine, "checkout", dialect.check_out, insert=True)
    event.listen(engine, "reset", _return)


def connect_to_read(engine: Engine) -> Connection:
    """Open a connection in autocommit mode."""
    reader = _caller(engine.dialect)
    _readers.add(reader)
    try:
        return engine.connect()
    finally:
        _readers.discard(reader)


class ReadingDialect(Dialect):
    """A dialect that sends no COMMIT and no ROLLBACK after plain reads in autocommit mode."""

    @override
    def do_commit(self, dbapi_connection: PoolProxiedConnection) -> None:
        if not _is_reading(dbapi_connection):
            super().do_commit(dbapi_connection)
            _record_end(dbapi_connection)

    @override
    def do_rollback(self, dbapi_connection: PoolProxiedConnection) -> None:
        if _is_reading(dbapi_connection):
            return
        marks = _marks_of(dbapi_connection)
        if not marks.pop(_RETURNS, False):
            super().do_rollback(dbapi_connection)
            _record_end(dbapi_connection)
            return
        # The pool calls this method when the connection returns. If this very commit or rollback of
        # a unit of work has ended the transaction already, another ROLLBACK would have no effect.
        end = marks[_OWED]
        if end is None or end is not current_end.get():
            super().do_rollback(dbapi_connection)
        _switch_on(dbapi_connection.dbapi_connection, marks)

    def check_out(
        self, driver: Any, entry: ConnectionPoolEntry, _proxy: PoolProxiedConnection
    ) -> None:
        """Called when a connection leaves the pool: switch autocommit on or off if needed."""
        marks = _marks_of(entry)
        marks.pop(_RETURNS, None)
        try:
            if _caller(self) in _readers:
                if not _is_reading(entry):
                    # With `pool_reset_on_return=None`, a transaction may still be open. The switch
                    # to autocommit mode would commit it.
                    driver.rollback()
                    _switch_on(driver, marks)
            elif _READS in marks:
                _switch_off(driver, marks)
        except self.loaded_dbapi.Error as error:
            if self.is_disconnect(error, driver, None):
                raise InvalidatePoolError(str(error)) from error
            raise


def _caller(dialect: Dialect) -> tuple[Dialect, object, int]:
    return dialect, current_task(), get_ident()


def _return(driver: Any, entry: ConnectionPoolEntry | None, state: PoolResetState) -> None:
    marks = _marks_of(entry)
    if _OWED in marks and state.transaction_was_reset:
        # `Connection.close()` has just sent ROLLBACK, and the pool sends no other one.
        _switch_on(driver, marks)
    elif _OWED in marks:
        marks[_RETURNS] = True


def _switch_on(driver: Any, marks: dict[str, Any]) -> None:
    marks.pop(_OWED, None)
    # Set `_READS` before the switch. If a signal handler raises an exception between these two
    # steps, `check_out` still switches autocommit off.
    marks[_READS] = True
    driver.autocommit(True)


def begin(pooled: PoolProxiedConnection) -> None:
    """Switch autocommit off, so that a transaction begins with the next statement."""
    _switch_off(pooled.dbapi_connection, _marks_of(pooled))


def obey(pooled: PoolProxiedConnection) -> None:
    """Stay in autocommit mode, but send COMMIT and ROLLBACK: the application wants this mode."""
    _marks_of(pooled).pop(_READS, None)


def _switch_off(driver: Any, marks: dict[str, Any]) -> None:
    driver.autocommit(False)
    if marks.pop(_READS, False):
        marks[_OWED] = None


def _is_reading(pooled: ManagesConnection) -> bool:
    """Return True if COMMIT and ROLLBACK would have no effect on the connection."""
    if _READS not in _marks_of(pooled):
        return False
    driver: Any = pooled.driver_connection
    return bool(driver.server_status & (_AUTOCOMMIT | _IN_TRANSACTION) == _AUTOCOMMIT)


def _record_end(pooled: PoolProxiedConnection) -> None:
    marks = _marks_of(pooled)
    if _OWED in marks:
        marks[_OWED] = current_end.get()


def _marks_of(pooled: ManagesConnection | None) -> dict[str, Any]:
    # A connection that the application has detached from the pool has no dictionary.
    marks = pooled.record_info if pooled is not None else None
    return {} if marks is None else marks


def _with_reads(dialect: type[Dialect]) -> type[Dialect]:
    # A derived dialect needs this attribute. Without it, SQLAlchemy does not cache compiled
    # statements.
    known = {"supports_statement_cache": dialect.supports_statement_cache}
    return types.new_class(
        dialect.__name__, (ReadingDialect, dialect), exec_body=lambda body: body.update(known)
    )
