"""Delays BEGIN on PostgreSQL until a session sends a statement that may write."""

from typing import Any
from weakref import WeakSet, ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect, ExecutionContext, TwoPhaseTransaction
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry
from typing_extensions import override

from asgi_dbsession.session._sqlalchemy import is_flushing, listen_first, stop_listening
from asgi_dbsession.session.reads import (
    Reads,
    begin_now,
    delayed,
    is_in_transaction,
    isolation_level,
)

from .plain import is_plain_read

# The dialects whose engines have the listeners of this module. An engine and its copies share one
# dialect, so no listener is added twice.
_watched: WeakSet[Dialect] = WeakSet()
# While a connection is in autocommit mode, its dictionary `info` has this key. When the connection
# returns to the pool, `_restore` then switches autocommit off.
_KEY = "asgi_dbsession.delayed_begin"


class DelayingReads(Reads):
    """Decides if the sessions of a PostgreSQL database read without BEGIN and COMMIT.

    At READ COMMITTED, each statement sees its own snapshot, with or without BEGIN. Source:
    https://www.postgresql.org/docs/current/transaction-iso.html

    Args:
        wanted: The option `autocommit_reads`. None: read without BEGIN only at READ COMMITTED.
    """

    def __init__(self, wanted: bool | None) -> None:
        self._wanted = wanted

    @override
    def delay_begin(self, session: Session, connection: Connection) -> None:
        """If a delay of BEGIN is safe, switch the connection to autocommit mode.

        The connection stays in this mode until the session sends a statement that may write.
        """
        if self._wanted is False or self.is_shared or not self._can_delay(session, connection):
            return
        # Mark the connection before autocommit is switched on. If a signal handler raises an
        # exception in between, the mark tells the pool to switch autocommit off.
        connection.info[_KEY] = True
        delayed[ref(connection, delayed.pop)] = _begin
        _set_autocommit(connection, True)

    def _can_delay(self, session: Session, connection: Connection) -> bool:
        dialect = connection.dialect
        if dialect not in _watched or connection.engine is not session.bind:
            return False
        if is_flushing(session) or is_in_transaction(connection):
            return False
        # Inside a savepoint, the transaction has begun on the server already. So BEGIN cannot be
        # delayed any more.
        if connection.in_nested_transaction():
            return False
        if isinstance(connection.get_transaction(), TwoPhaseTransaction):
            return False
        # Return False if the application has a listener for `begin` or `after_begin`. The listener
        # may send `SET LOCAL`, which needs a transaction at once. Compare with 1, because this
        # package itself has one listener for `after_begin`.
        if len(session.dispatch.after_begin) > 1 or connection.dispatch.begin:
            return False
        level = isolation_level(connection)
        return level != "AUTOCOMMIT" and (self._wanted is True or level == "READ COMMITTED")


def watch_reads(engine: Engine) -> None:
    """Add listeners to a PostgreSQL engine that switch off the autocommit mode of a connection.

    A session reads in autocommit mode, without BEGIN. This mode ends before the first statement
    that may write, or when the connection returns to the pool.
    """
    if engine.dialect not in _watched:
        _watched.add(engine.dialect)
        event.listen(engine, "checkin", _restore)
        watch_statements(engine)


def watch_statements(engine: Engine) -> None:
    """Add listeners to `engine` that switch autocommit off before a statement that may write."""
    for name, listener in _LISTENERS.items():
        listen_first(engine, name, listener)


def unwatch_reads(engine: Engine) -> None:
    """Remove all listeners that the function `watch_reads` has added to `engine`."""
    if engine.dialect in _watched:
        _watched.discard(engine.dialect)
        event.remove(engine, "checkin", _restore)
        for name, listener in _LISTENERS.items():
            stop_listening(engine, name, listener)


def _begin(connection: Connection, _in_statement: bool) -> None:
    _set_autocommit(connection, False)
    connection.info.pop(_KEY, None)


def _set_autocommit(connection: Connection, value: bool) -> None:
    driver: Any = connection.connection.dbapi_connection
    driver.autocommit = value


def _begin_unless_plain(
    _cursor: object, _statement: str, _parameters: object, context: ExecutionContext
) -> None:
    connection = context.root_connection
    if ref(connection) in delayed and not is_plain_read(context):
        begin_now(connection, in_statement=True)


def _begin_always(*arguments: Any) -> None:
    begin_now(arguments[-1].root_connection, in_statement=True)


def _restore(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    if record.info.pop(_KEY, False) and dbapi_connection is not None:
        dbapi_connection.autocommit = False


_LISTENERS: dict[str, Any] = {
    "do_execute": _begin_unless_plain,
    "do_executemany": _begin_always,
    "do_execute_no_params": _begin_always,
}
