"""The only module, besides those in `testing`, that uses private names of SQLAlchemy (`_name`).

These names were checked with SQLAlchemy 2.0.40 and 2.1.9. A test reports any name that is missing.
"""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Transaction, TwoPhaseTransaction
from sqlalchemy.event.api import _event_key
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionOrigin, SessionTransactionState, _sessions
from typing_extensions import override


def forget(session: Session) -> None:
    """Remove a closed session from SQLAlchemy's registry of all sessions.

    If the session stayed in the registry, the registry would run a callback when the session is
    garbage collected. Python ignores exceptions inside such a callback. A signal handler that
    raises its exception there (for Ctrl-C or a time limit) would have no effect.
    """
    _sessions.pop(session.hash_key, None)


def flush_for_commit(session: Session) -> None:
    """Do what SQLAlchemy does before COMMIT: flush, release the savepoints, and send PREPARE.

    PREPARE is sent only with SQLAlchemy's option `twophase=True`. The next operation of the session
    must be COMMIT or ROLLBACK.
    """
    transaction = session.get_transaction() or session.begin()
    # Do not use `Session.prepare`: without `twophase=True`, SQLAlchemy raises an error there.
    transaction._prepare_impl()


class ConnectingSession(Session):
    """Base class of sessions that can replace SQLAlchemy's class `SessionTransaction`.

    `begin()` and `begin_nested()` create an object of the class `transaction_class` instead. If the
    application does not call `begin()`, the first statement begins a transaction. Its class is
    `ConnectingTransaction` if this package must open its connection, for example to a replica.
    """

    transaction_class: type[SessionTransaction] = SessionTransaction

    @override
    def begin(self, nested: bool = False) -> SessionTransaction:
        outer = self._transaction
        if not nested or (outer is not None and outer._state is not SessionTransactionState.ACTIVE):
            # For a savepoint in an inactive transaction, let SQLAlchemy's `begin` raise its error.
            return super().begin(nested)
        outer = outer or self._autobegin_t(begin=True)
        inner = self.transaction_class(self, SessionTransactionOrigin.BEGIN_NESTED, outer)
        self._nested_transaction = inner
        return inner

    @override
    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:
        if self._transaction is not None:
            return self._transaction
        if begin:
            return self.transaction_class(self, SessionTransactionOrigin.BEGIN)
        if vars(self)["_companion"].connect is None or not self.autobegin:
            return super()._autobegin_t()
        return ConnectingTransaction(self, SessionTransactionOrigin.AUTOBEGIN)


class SkippingEmptyFlush(Session):
    """A session that calls `flush` before a statement only if there is something to flush."""

    @override
    def _autoflush(self) -> None:
        if has_changes(self):
            super()._autoflush()


class ConnectingTransaction(SessionTransaction):
    """A transaction that can open its connection with a function of this package.

    SQLAlchemy's own class calls `Engine.connect()`. This package may connect to a replica instead.
    """

    @override
    def __exit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        is_rolled_back = self._state is SessionTransactionState.DEACTIVE and not self.nested
        if type_ is None and is_rolled_back:
            # A flush failed in this `with session.begin()` block, and the application caught the
            # error. The work was rolled back, so let `commit()` raise an error.
            try:
                self.commit()
            except PendingRollbackError as error:
                super().__exit__(type(error), error, error.__traceback__)
                raise
        super().__exit__(type_, value, traceback)

    def _connection_for_bind(self, bind: Any, execution_options: Any) -> Connection:
        session: Any = self.session
        connect = session._companion.connect
        is_new = self.parent is None and bind not in self._connections
        if connect is not None and is_new and isinstance(bind, Engine):
            bind = _Connector(partial(connect, session, bind))
        return super()._connection_for_bind(bind, execution_options)


class _Connector(NamedTuple):
    """A stand-in for an engine. SQLAlchemy calls `connect`, which is a function of this package."""

    connect: Callable[[], Connection]


def is_prepared(transaction: Transaction | None) -> bool:
    """Return True if PREPARE (two-phase commit) has succeeded for a transaction."""
    return isinstance(transaction, TwoPhaseTransaction) and transaction._is_prepared


def has_changes(session: Session) -> bool:
    """Return True if the session has changed objects that were not sent to the database yet."""
    return not session._is_clean()


def is_flushing(session: Any) -> bool:
    """Return True if the session is sending its changed objects to the database (a flush) now."""
    return bool(session._flushing)


def is_orm_enabled(select: Any) -> bool:
    """Return True for a SELECT of ORM classes. SQLAlchemy may add joins and conditions to it."""
    return bool(select._propagate_attrs.get("compile_state_plugin") == "orm")


def is_server_side(context: Any) -> bool:
    """Return True if the statement fetches its rows through a cursor on the database server."""
    return bool(context._is_server_side)


def has_additions(element: Any) -> bool:
    """Return True if a SELECT or table has hints, prefixes or suffixes, which may be any SQL."""
    names = ("_prefixes", "_suffixes", "_hints", "_statement_hints")
    return any(getattr(element, name, None) for name in names)


def renders_expressions(type_: Any, dialect: Any) -> bool:
    """Return True if a column type adds SQL of its own around a column or a value."""
    return type_ is not None and any(
        each._has_column_expression or each._has_bind_expression
        for each in (type_, type_.dialect_impl(dialect))
    )


def isolation_level_on_connect(target: Connection | Engine) -> str | None:
    """Return the isolation level that the engine sets on each new connection, or None."""
    level: str | None = target.dialect._on_connect_isolation_level
    return level


def on_checkin(connection: Connection, function: Callable[[Any], object]) -> None:
    """Call `function` with the driver's connection once, just before it returns to the pool."""
    record = connection.connection._connection_record
    if record is not None:
        record.finalize_callback.append(function)


def pool_entry(connection: Connection) -> Any:
    """Return the pool entry of a connection, or None if another thread has just closed it."""
    return getattr(connection._dbapi_connection, "_connection_record", None)


def connections_of(transaction: SessionTransaction) -> dict[Connection, Transaction | None]:
    """Return the connections (also closed ones) that a session has used in `transaction`.

    Each key is a connection. Its value is the database transaction on this connection, or None if
    the application itself began the database transaction. Then the session does not commit it.
    """
    return {
        connection: begun if should_commit else None
        for connection, begun, should_commit, _ in transaction._connections.values()
    }


def pool_of(connection: Any) -> Any:
    """Return the pool to which a connection goes back, even if the engine has a new pool now."""
    return connection.connection._pool


def original_engine(engine: Engine) -> Engine:
    """Return the engine from which `engine` was copied with other options, or `engine` itself.

    An engine and its copies (`Engine.execution_options`) share a dialect and a pool, and a copy has
    all listeners of its original. So this package adds its listeners to the original engine only.
    """
    while (original := vars(engine).get("_proxied")) is not None:
        engine = original
    return engine


def listen_first(engine: Engine, name: str, listener: Callable[..., object]) -> None:
    """Add a listener in front of all others, for an event of `sqlalchemy.events.DialectEvents`.

    If the application has added a listener to the class `Engine`, add `listener` to this class.
    Then `listener` is called for all engines of the process.
    """
    dispatch: Any = engine.dialect.dispatch
    target: Any = Engine if getattr(dispatch, name).parent_listeners else engine
    stop_listening(target, name, listener)
    key: Any = _event_key(target, name, listener)
    key.dispatch_target._has_events = True
    # Do not use `event.listen`: for events of `DialectEvents`, SQLAlchemy ignores `insert=True`.
    key.base_listen(insert=True)


def is_first(target: Any, name: str, listener: Callable[..., object]) -> bool:
    """Return True if `listener` is still called first, after `listen_first` has put it in front.

    The result is False if the application has added a listener to the class `Engine` later.
    `target` is an engine or a connection.
    """
    of_class: Any = getattr(target.dialect.dispatch, name).parent_listeners
    return not of_class or of_class[0] is listener


def stop_listening(target: Any, name: str, listener: Callable[..., object]) -> None:
    """Remove `listener` from `target` (an engine, or the class `Engine`), if it was added there."""
    if event.contains(target, name, listener):
        event.remove(target, name, listener)


def most_overflow(pool: Any) -> int:
    """Return how many connections a pool may open beyond `pool_size`; negative means no limit."""
    return int(pool._max_overflow)


def handle_driver_error(connection: Connection, error: BaseException) -> None:
    """Raise an error of the driver at BEGIN as SQLAlchemy does: as an SQLAlchemy error.

    Before that, the listeners for `handle_error` are called, and a lost connection is closed.
    """
    connection._handle_dbapi_exception(error, None, None, None, None)
