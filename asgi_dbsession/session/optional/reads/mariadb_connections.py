"""Switches connections to MariaDB or MySQL between autocommit mode and transactions.

With `autocommit_reads=True`, autocommit is switched off before a write. BEGIN alone is not safe:
after CREATE TABLE or a deadlock, the server would store each write at once.
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

# Two bits of the server's status in each answer: a transaction is open (1), autocommit is on (2).
# Bit 1 is reliable only with autocommit on. Source: https://mariadb.com/kb/en/ok_packet/
_IN_TRANSACTION, _AUTOCOMMIT = 1, 2
# A connection has this key in SQLAlchemy's dictionary `record_info` while the connection only
# reads, in autocommit mode.
_READS = "asgi_dbsession.reads"
# A connection has this key in `record_info` after autocommit was switched off, mostly for a write.
# When the connection returns to its pool, autocommit is switched on again. The value is the last
# commit or rollback on the connection (an `End`), or None. It tells if the pool must send ROLLBACK.
_OWED = "asgi_dbsession.autocommit_owed"
# A connection has this key in `record_info` while the connection returns to its pool. The key tells
# `do_rollback` that the pool calls it. Then `do_rollback` skips a needless ROLLBACK.
_RETURNS = "asgi_dbsession.returns"

# The callers (dialect, task and thread) that now wait for a connection in autocommit mode. Do not
# use a `ContextVar`: a task that a listener starts meanwhile would inherit the value.
_readers: set[tuple[Dialect, object, int]] = set()


def watch_connections(engine: Engine) -> None:
    """Add listeners to an engine that switch the autocommit mode of its connections.

    A listener is called when a connection leaves its pool, and another when it returns. The dialect
    of the engine also gets a new class, which sends no needless COMMIT and ROLLBACK.
    """
    engine.dialect.__class__ = _with_reads(type(engine.dialect))
    dialect: Any = engine.dialect
    event.listen(engine, "checkout", dialect.check_out, insert=True)
    event.listen(engine, "reset", _return)


def connect_to_read(engine: Engine) -> Connection:
    """Open a connection in autocommit mode, for a session that is about to read."""
    reader = _caller(engine.dialect)
    _readers.add(reader)
    try:
        return engine.connect()
    finally:
        _readers.discard(reader)


class ReadingDialect(Dialect):
    """A dialect that sends no COMMIT and no ROLLBACK after reads in autocommit mode.

    In autocommit mode, no transaction is open after a read. So COMMIT and ROLLBACK would only cost
    round trips to the server.
    """

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
        # The pool sends ROLLBACK when a connection returns. Skip this round trip if the request or
        # `begin()` block has just sent COMMIT or ROLLBACK itself.
        end = marks[_OWED]
        if end is None or end is not current_end.get():
            super().do_rollback(dbapi_connection)
        _switch_on(dbapi_connection.dbapi_connection, marks)

    def check_out(
        self, driver: Any, entry: ConnectionPoolEntry, _proxy: PoolProxiedConnection
    ) -> None:
        """Called when a connection leaves the pool: switch autocommit on or off.

        Autocommit is switched on for a session that is about to read, and off for all other code.
        """
        marks = _marks_of(entry)
        marks.pop(_RETURNS, None)
        try:
            if _caller(self) in _readers:
                if not _is_reading(entry):
                    # With `pool_reset_on_return=None`, an earlier transaction may still be open on
                    # the connection. Switching autocommit on would commit this transaction. So
                    # first send ROLLBACK.
                    driver.rollback()
                    _switch_on(driver, marks)
            elif _READS in marks:
                _switch_off(driver, marks)
        except self.loaded_dbapi.Error as error:
            # If the server has closed the connection while it was in the pool, this error lets
            # SQLAlchemy open a new connection and use it instead.
            if self.is_disconnect(error, driver, None):
                raise InvalidatePoolError(str(error)) from error
            raise


def _caller(dialect: Dialect) -> tuple[Dialect, object, int]:
    return dialect, current_task(), get_ident()


def _return(driver: Any, entry: ConnectionPoolEntry | None, state: PoolResetState) -> None:
    marks = _marks_of(entry)
    if _OWED in marks and state.transaction_was_reset:
        # SQLAlchemy's `Connection.close()` has just sent ROLLBACK, so the pool sends no ROLLBACK of
        # its own. Usually, autocommit is switched on at the ROLLBACK of the pool (`do_rollback`).
        # So switch autocommit on here.
        _switch_on(driver, marks)
    elif _OWED in marks:
        marks[_RETURNS] = True


def _switch_on(driver: Any, marks: dict[str, Any]) -> None:
    marks.pop(_OWED, None)
    # Set the key `_READS` before autocommit is switched on. In the other order, an exception of a
    # signal handler could leave autocommit on without the key. Then nothing would switch autocommit
    # off before a write, and a rollback could not undo the write.
    marks[_READS] = True
    driver.autocommit(True)


def begin(pooled: PoolProxiedConnection) -> None:
    """Switch autocommit off, so that the server begins a transaction at the next statement."""
    _switch_off(pooled.dbapi_connection, _marks_of(pooled))


def obey(pooled: PoolProxiedConnection) -> None:
    """Let SQLAlchemy send COMMIT and ROLLBACK on a connection, as usual. Autocommit stays on.

    While a session only reads, this module skips both. But for this connection, the application
    itself has chosen AUTOCOMMIT. So this module no longer changes what SQLAlchemy sends.
    """
    _marks_of(pooled).pop(_READS, None)


def _switch_off(driver: Any, marks: dict[str, Any]) -> None:
    driver.autocommit(False)
    if marks.pop(_READS, False):
        marks[_OWED] = None


def _is_reading(pooled: ManagesConnection) -> bool:
    """Return True if a connection has only read in autocommit mode, so no transaction is open.

    The status from the last answer of the server is checked too. The application may have begun a
    transaction, or switched autocommit off, on the driver's own connection.
    """
    if _READS not in _marks_of(pooled):
        return False
    driver: Any = pooled.driver_connection
    return bool(driver.server_status & (_AUTOCOMMIT | _IN_TRANSACTION) == _AUTOCOMMIT)


def _record_end(pooled: PoolProxiedConnection) -> None:
    marks = _marks_of(pooled)
    if _OWED in marks:
        marks[_OWED] = current_end.get()


def _marks_of(pooled: ManagesConnection | None) -> dict[str, Any]:
    # If the application has detached a connection from its pool, SQLAlchemy has no `record_info`
    # dictionary for this connection. Then return an empty dictionary: the connection has no keys of
    # this module.
    marks = pooled.record_info if pooled is not None else None
    return {} if marks is None else marks


def _with_reads(dialect: type[Dialect]) -> type[Dialect]:
    # SQLAlchemy looks for `supports_statement_cache` only in a dialect's own class, not in the base
    # classes. Without this attribute, SQLAlchemy does not cache compiled statements.
    known = {"supports_statement_cache": dialect.supports_statement_cache}
    return types.new_class(
        dialect.__name__, (ReadingDialect, dialect), exec_body=lambda body: body.update(known)
    )
