"""All private (underscore) names of SQLAlchemy that this package uses, each in one function.

These names were checked with SQLAlchemy 2.0.40 and 2.1.9. If a later version removes a name, a test
in `tests/test_rooms.py` fails and reports the name.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import Transaction, TwoPhaseTransaction
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import (
    SessionTransactionOrigin,
    SessionTransactionState,
    _sessions,
)
from sqlalchemy.pool import QueuePool


def begin(session: Any, made_by: type[SessionTransaction], *, nested: bool) -> SessionTransaction:
    """Do the same as `Session.begin`, but make the transaction object with the class `made_by`.

    SQLAlchemy has no public option to choose the class of the transaction object.

    Raises:
        sqlalchemy.exc.InvalidRequestError: In the same cases as `Session.begin`.
    """
    if not session.in_transaction():
        transaction = made_by(session, SessionTransactionOrigin.BEGIN)
        if not nested:
            return transaction
    outer: Any = session.get_nested_transaction() or session.get_transaction()
    if not nested or outer._state is not SessionTransactionState.ACTIVE:
        # The session's transaction cannot begin now: it has begun already, or has ended. Call
        # SQLAlchemy's own `begin`, which raises the error for this case.
        return Session.begin(session, nested)
    inner = made_by(session, SessionTransactionOrigin.BEGIN_NESTED, session._transaction)
    session._nested_transaction = inner
    return inner


def forget(session: Session) -> None:
    """Remove a closed session from SQLAlchemy's registry of all sessions.

    If the session stayed in the registry, the registry would run a callback when the session is
    garbage collected. Python ignores exceptions inside such a callback. A signal handler that
    raises its exception there (for Ctrl-C or a time limit) would have no effect.
    """
    _sessions.pop(session.hash_key, None)


def flush_for_commit(session: Session, *, prepare: bool) -> None:
    """Do what SQLAlchemy does before COMMIT: flush, release the savepoints, and send PREPARE.

    SQLAlchemy's method `Session.prepare` does not fit here, because it raises an error if a
    savepoint is open or if the session does not use two-phase commit.

    Args:
        session: The session to flush. Its next operation must be COMMIT or ROLLBACK.
        prepare: True to send PREPARE if the session uses two-phase commit. False if the caller
            sends PREPARE itself.
    """
    transaction = session.get_transaction() or session.begin()
    is_in_two_phases = session.twophase
    session.twophase = is_in_two_phases and prepare
    try:
        transaction._prepare_impl()
    finally:
        session.twophase = is_in_two_phases


class NamingSession(Session):
    """A session that makes its transaction objects with the class `transaction_class` if needed.

    SQLAlchemy always uses the class `SessionTransaction` for a transaction that begins
    automatically at the first statement. A session with two-phase commit or with replicas needs the
    methods of `transaction_class`.
    """

    transaction_class: type[SessionTransaction] = SessionTransaction

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:
        companion: Any = vars(self).get("_companion")
        is_own = companion is not None and companion.needs_own_transaction
        if not is_own or self._transaction is not None or not (begin or self.autobegin):
            return super()._autobegin_t(begin)
        return self.transaction_class(self, SessionTransactionOrigin.AUTOBEGIN)


class NamingTransaction(SessionTransaction):
    """The transaction object of a session that uses two-phase commit or replicas.

    With two-phase commit, this class gives each database transaction a name that an operator can
    understand. SQLAlchemy's own names would be random. With replicas, this class connects to the
    server (primary or replica) that `companion.route` has chosen.
    """

    def _connection_for_bind(self, bind: Any, execution_options: Any) -> Connection:
        session: Any = self.session
        names, route = session._companion.two_phases, session._companion.route
        # Give a name only to the transaction on the session's first connection. The name contains
        # the place of this transaction in the order of COMMITs. For further connections of the
        # session (SQLAlchemy's option `binds`), this order is not known.
        is_first = self.parent is None and not self._connections
        if names is not None and is_first and isinstance(bind, Engine):
            bind = _NamingEngine(bind, names.name(session))
        elif route is not None and self._is_routed(bind):
            bind = _RoutedEngine(session, route)
        connection: Connection = super()._connection_for_bind(bind, execution_options)
        return connection

    def _is_routed(self, bind: Any) -> bool:
        return self.parent is None and bind is self.session.bind and bind not in self._connections


class _RoutedEngine:
    """Stands in for an engine: `connect()` uses the chosen server (the primary or a replica)."""

    def __init__(self, session: Any, route: Any) -> None:
        self.connect: Callable[[], Connection] = partial(route.connect, session)


class _NamingEngine:
    """Stands in for an engine: the next two-phase transaction of its connection gets a name."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name

    def connect(self) -> Connection:
        connection = self._engine.connect()

        def begin_named() -> TwoPhaseTransaction:
            del vars(connection)["begin_twophase"]
            return connection.begin_twophase(self._name)

        vars(connection)["begin_twophase"] = begin_named
        return connection


def is_prepared(transaction: Transaction | None) -> bool:
    """Return True if PREPARE (two-phase commit) has succeeded for a transaction."""
    return isinstance(transaction, TwoPhaseTransaction) and transaction._is_prepared


def is_flushing(session: Any) -> bool:
    """Return True if the session is sending its changed objects to the database (a flush) now."""
    found: bool = session._flushing
    return found


def is_orm_enabled(select: Any) -> bool:
    """Return True if SQLAlchemy's ORM replaces the SELECT by another SELECT at compilation."""
    return bool(select._propagate_attrs.get("compile_state_plugin") == "orm")


def is_server_side(context: Any) -> bool:
    """Return True if the statement fetches its rows through a cursor on the database server."""
    found: bool = context._is_server_side
    return found


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


def isolation_level_on_connect(connection: Connection) -> str | None:
    """Return the isolation level that the engine sets on each new connection, or None."""
    level: str | None = connection.dialect._on_connect_isolation_level
    return level


def on_checkin(connection: Connection, function: Callable[[Any], object]) -> None:
    """Call `function` with the driver's connection once, just before it returns to the pool."""
    record = connection.connection._connection_record
    if record is not None:
        record.finalize_callback.append(function)


def pool_entry(connection: Connection) -> Any:
    """Return the pool entry of a connection, or None if another thread has just closed it."""
    pooled: Any = connection._dbapi_connection
    return pooled._connection_record if pooled is not None else None


def original_engine(engine: Any) -> Engine:
    """Return the engine from which `engine` was copied with other options, or `engine` itself.

    An engine and its copies (`Engine.execution_options`) share a dialect and a pool, and a copy has
    all listeners of its original. So this package adds its listeners to the original engine only.
    """
    while (original := vars(engine).get("_proxied")) is not None:
        engine = original
    found: Engine = engine
    return found


def most_overflow(pool: QueuePool) -> int:
    """Return how many connections a pool may open beyond `pool_size`; negative means no limit."""
    most: int = pool._max_overflow
    return most
