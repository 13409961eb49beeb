"""Switches connections to MariaDB or MySQL between autocommit mode and transactions.

This module is used only with the option `autocommit_reads=True`. A connection that has only read
stays in autocommit mode, also while it is in the pool. Before any other use of the connection (a
write, SQL text, `database.engine`), this module switches autocommit off. This is SQLAlchemy's usual
mode: the server begins a transaction at the next statement.

It would not be safe to leave autocommit on and send BEGIN before a write. CREATE TABLE or a
deadlock ends the transaction early, and the server would then be in autocommit mode again. It would
store the next write at once, even if the request fails later.
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

# The server sends a status (a number made of bits) with each answer. The bit with the value 1 means
# that a transaction is open. The bit with the value 2 means that autocommit is on. The first bit is
# reliable only while autocommit is on. Source: https://mariadb.com/kb/en/ok_packet/
_IN_TRANSACTION, _AUTOCOMMIT = 1, 2
# This module stores three keys in `record_info`, a dictionary that SQLAlchemy keeps for each
# connection of a pool.
#
# `_READS`: the connection is in autocommit mode, and is used only for reads. No transaction is
# open, so this module sends no COMMIT and no ROLLBACK.
#
# `_OWED`: autocommit is off, because the connection is used for more than reads. When the
# connection returns to the pool, this module must switch autocommit on again. The pool also sends
# ROLLBACK then. This module skips the ROLLBACK if the request or `begin()` block has just sent
# COMMIT or ROLLBACK itself. To know this, the module stores a value with the key: the `End` object
# (one commit or rollback of a request or `begin()` block) that sent the last COMMIT or ROLLBACK.
# The value is None if none was sent, or if the application sent it (by `session.commit()`, say).
#
# `_RETURNS`: the pool has begun to take back a connection that has the key `_OWED`. So the next
# ROLLBACK on the connection is the ROLLBACK of the pool.
_READS, _OWED = "asgi_dbsession.reads", "asgi_dbsession.autocommit_owed"
_RETURNS = "asgi_dbsession.returns"

# The callers of `connect_to_read` that wait for a connection now. Each caller is stored as a tuple
# of its dialect, task and thread. The listener `check_out` gives these callers a connection in
# autocommit mode. (A `ContextVar` would not be safe here. If another listener starts a task at this
# time, the task would inherit the value of the `ContextVar`. Then `check_out` would give the task
# connections in autocommit mode too.)
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
        # The pool calls this method because the connection returns to the pool. Usually, the
        # connection returns during a commit or rollback of a request or `begin()` block, just after
        # COMMIT or ROLLBACK was sent. Then no transaction is open, and another ROLLBACK would only
        # cost a round trip. In all other cases, a transaction may be open: send ROLLBACK.
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
    # First mark the connection with `_READS`, then switch autocommit on. On a connection with this
    # mark, autocommit is switched off before a write. With the other order, a signal handler could
    # raise an exception between the two steps. Then there would be no mark, and a later request
    # would write in autocommit mode.
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
    # SQLAlchemy looks for the attribute `supports_statement_cache` in the class of the dialect, but
    # not in the base classes. Without the attribute, SQLAlchemy does not cache compiled statements.
    # So copy the attribute into the new class.
    known = {"supports_statement_cache": dialect.supports_statement_cache}
    return types.new_class(
        dialect.__name__, (ReadingDialect, dialect), exec_body=lambda body: body.update(known)
    )
