"""All private names of SQLAlchemy that this package uses, each in one function.

Checked with SQLAlchemy 2.0.40 and 2.1.9. If SQLAlchemy changes, `tests/test_rooms.py` reports the
missing name.
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
    """Do what `Session.begin` does, but make the transaction with the class `made_by`.

    SQLAlchemy has no option for the class of a transaction.

    Raises:
        sqlalchemy.exc.InvalidRequestError: In the same cases as `Session.begin`.
    """
    if not session.in_transaction():
        transaction = made_by(session, SessionTransactionOrigin.BEGIN)
        if not nested:
            return transaction
    outer: Any = session.get_nested_transaction() or session.get_transaction()
    if not nested or outer._state is not SessionTransactionState.ACTIVE:
        # A transaction has begun already, or has ended: SQLAlchemy's own `begin` raises the right
        # error.
        return Session.begin(session, nested)
    inner = made_by(session, SessionTransactionOrigin.BEGIN_NESTED, session._transaction)
    session._nested_transaction = inner
    return inner


def forget(session: Session) -> None:
    """Remove a closed session from SQLAlchemy's registry of all sessions.

    Otherwise each garbage collection of a session runs a callback of the registry. If a signal
    handler raises an exception inside the callback, Python ignores the exception: Ctrl-C or a time
    limit would have no effect.
    """
    _sessions.pop(session.hash_key, None)


def flush_for_commit(session: Session, *, prepare: bool) -> None:
    """Do all that SQLAlchemy does before COMMIT: flush, release savepoints, send PREPARE.

    `Session.prepare` cannot be used: it refuses open savepoints, and needs two-phase commit.

    Args:
        session: The session to flush. Its next operation must be COMMIT or ROLLBACK.
        prepare: True to send PREPARE if the session uses two-phase commit; False if the caller
            sends PREPARE.
    """
    transaction = session.get_transaction() or session.begin()
    is_in_two_phases = session.twophase
    session.twophase = is_in_two_phases and prepare
    try:
        transaction._prepare_impl()
    finally:
        session.twophase = is_in_two_phases


class NamingSession(Session):
    """A session that can use `transaction_class` for a transaction that begins automatically.

    SQLAlchemy itself would use `SessionTransaction`. A session with two-phase commit or with
    replicas needs `transaction_class` instead.
    """

    transaction_class: type[SessionTransaction] = SessionTransaction

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:
        companion: Any = vars(self).get("_companion")
        is_own = companion is not None and companion.needs_own_transaction
        if not is_own or self._transaction is not None or not (begin or self.autobegin):
            return super()._autobegin_t(begin)
        return self.transaction_class(self, SessionTransactionOrigin.AUTOBEGIN)


class NamingTransaction(SessionTransaction):
    """A transaction of a session that uses two-phase commit or replicas.

    For two-phase commit, this package names the transaction; SQLAlchemy's names would be random.
    With replicas, `companion.route` opens the connection, to the server that it has chosen.
    """

    def _connection_for_bind(self, bind: Any, execution_options: Any) -> Connection:
        session: Any = self.session
        names, route = session._companion.two_phases, session._companion.route
        # In two-phase commit, the name of a transaction has a number: the order of the COMMITs. So
        # name only the transaction of the session's first connection. With several `binds`,
        # SQLAlchemy commits the session's other connections in an unknown order.
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
    """Takes the place of an engine, and connects to the server that `companion.route` chooses."""

    def __init__(self, session: Any, route: Any) -> None:
        self.connect: Callable[[], Connection] = partial(route.connect, session)


class _NamingEngine:
    """Takes the place of an engine, and gives its next two-phase transaction the name `name`."""

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
    """Return True if the session is flushing now."""
    found: bool = session._flushing
    return found


def is_orm_enabled(select: Any) -> bool:
    """Return True if the ORM replaces the SELECT by another SELECT at compilation."""
    return bool(select._propagate_attrs.get("compile_state_plugin") == "orm")


def is_server_side(context: Any) -> bool:
    """Return True if the rows of the statement are read through a cursor on the server."""
    found: bool = context._is_server_side
    return found


def has_additions(element: Any) -> bool:
    """Return True if a SELECT or table has hints, prefixes or suffixes, which are free text."""
    names = ("_prefixes", "_suffixes", "_hints", "_statement_hints")
    return any(getattr(element, name, None) for name in names)


def renders_expressions(type_: Any, dialect: Any) -> bool:
    """Return True if a column type writes its own SQL around a column or value."""
    return type_ is not None and any(
        each._has_column_expression or each._has_bind_expression
        for each in (type_, type_.dialect_impl(dialect))
    )


def isolation_level_on_connect(connection: Connection) -> str | None:
    """Return the isolation level that the engine sets on new connections; None if it sets none."""
    level: str | None = connection.dialect._on_connect_isolation_level
    return level


def on_checkin(connection: Connection, function: Callable[[Any], object]) -> None:
    """Call `function` once with the driver's connection, before the connection enters the pool."""
    record = connection.connection._connection_record
    if record is not None:
        record.finalize_callback.append(function)


def most_overflow(pool: QueuePool) -> int:
    """Return how many connections the pool may open beyond its size; negative for no limit."""
    most: int = pool._max_overflow
    return most
