"""Every private name of SQLAlchemy that this package uses, and what for.

Checked with SQLAlchemy 2.0.40 and 2.1.9. `tests/test_sqlalchemy.py` says which name is missing when
SQLAlchemy changes.
"""

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine import Transaction, TwoPhaseTransaction
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import (
    SessionTransactionOrigin,
    SessionTransactionState,
    _sessions,
)
from sqlalchemy.pool import QueuePool


def begin(session: Any, made_by: type[SessionTransaction], *, nested: bool) -> SessionTransaction:
    """`Session.begin`, with the class of the transaction: SQLAlchemy has no factory for it.

    Raises:
        sqlalchemy.exc.InvalidRequestError: As `Session.begin`.
    """
    if not session.in_transaction():
        transaction = made_by(session, SessionTransactionOrigin.BEGIN)
        if not nested:
            return transaction
    outer: Any = session.get_nested_transaction() or session.get_transaction()
    if not nested or outer._state is not SessionTransactionState.ACTIVE:
        return Session.begin(session, nested)  # which raises the error for this state
    inner = made_by(session, SessionTransactionOrigin.BEGIN_NESTED, session._transaction)
    session._nested_transaction = inner
    return inner


def forget(session: Session) -> None:
    """Take a closed session out of the registry for `close_all_sessions` and `object_session`.

    Otherwise a garbage collection runs a callback for each, and Python ignores an exception that a
    signal handler raises there: Ctrl-C, or a time limit, would have no effect.
    """
    _sessions.pop(session.hash_key, None)


def flush_and_prepare(session: Session) -> None:
    """Do what SQLAlchemy's COMMIT does first: flush, end savepoints, PREPARE in two phases.

    `Session.prepare` is for two phases only, and refuses open savepoints.
    """
    (session.get_transaction() or session.begin())._prepare_impl()


def is_prepared(transaction: Transaction | None) -> bool:
    """Whether PREPARE has succeeded."""
    return isinstance(transaction, TwoPhaseTransaction) and transaction._is_prepared


def is_flushing(session: Any) -> bool:
    """Whether a flush is under way."""
    found: bool = session._flushing
    return found


def is_orm_enabled(select: Any) -> bool:
    """Whether the ORM replaces this SELECT by another one when it is compiled."""
    return bool(select._propagate_attrs.get("compile_state_plugin") == "orm")


def is_server_side(context: Any) -> bool:
    """Whether a statement is read through a cursor on the server."""
    found: bool = context._is_server_side
    return found


def has_additions(element: Any) -> bool:
    """Whether hints, prefixes or suffixes were added to a SELECT or a table, as text."""
    names = ("_prefixes", "_suffixes", "_hints", "_statement_hints")
    return any(getattr(element, name, None) for name in names)


def renders_expressions(type_: Any, dialect: Any) -> bool:
    """Whether a type writes SQL of its own around a column or a value."""
    return type_ is not None and any(
        each._has_column_expression or each._has_bind_expression
        for each in (type_, type_.dialect_impl(dialect))
    )


def isolation_level_on_connect(connection: Connection) -> str | None:
    """The isolation level that the engine sets on each new connection; None for the server's."""
    level: str | None = connection.dialect._on_connect_isolation_level
    return level


def most_overflow(pool: QueuePool) -> int:
    """How many connections a pool may open beyond its size; below 0 for no limit."""
    most: int = pool._max_overflow
    return most
