"""Remembers statements that failed, so that COMMIT never loses work in silence."""

from asyncio import CancelledError
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakSet, ref

from sqlalchemy import Connection, Engine, event, select
from sqlalchemy.engine import Dialect, ExceptionContext, Transaction, TwoPhaseTransaction
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_dbsession.errors import TransactionAborted, without_secrets

from ._sqlalchemy import is_prepared
from .completion import run_to_completion

# Transactions in which a statement failed: the driver's message, and whether the database then
# rolled back the whole transaction by itself. The database would not know any more: to it, the
# next statement began another transaction. A savepoint is a transaction of its own, so a rollback
# to it leaves its entry behind.
# Not a WeakKeyDictionary: each COMMIT asks whether there is any entry, which that answers slowly.
failed_transactions: dict[ref[Transaction], tuple[str, bool]] = {}

# The errors at which InnoDB rolls back everything, savepoints included: a deadlock, a snapshot that
# is out of date (MariaDB), a lock table that is full.
# Source: https://dev.mysql.com/doc/refman/8.4/en/innodb-error-handling.html
_ROLLING_BACK = (1213, 1020, 1206)


# The engines of this package's databases, and whoever else watches all of them. An engine and its
# copies with other options share a dialect.
_watched: WeakSet[Engine] = WeakSet()
_dialects: WeakSet[Dialect] = WeakSet()
_watchers: dict[Callable[[Engine], None], Callable[[Engine], None]] = {}


def watch(engine: Engine) -> None:
    """Have `engine` record statements that fail; twice is the same as once."""
    if engine.dialect not in _dialects:
        event.listen(engine, "handle_error", _record_failure)
        _dialects.add(engine.dialect)
        _watched.add(engine)
        for watcher in _watchers:
            watcher(engine)


def watch_all(watcher: Callable[[Engine], None], undo: Callable[[Engine], None]) -> None:
    """Call `watcher` once with each engine of this package's databases, now and later.

    Args:
        watcher: Adds listeners to an engine.
        undo: Takes them away, when nobody uses the engine through this package any more.
    """
    if watcher not in _watchers:
        _watchers[watcher] = undo
        for engine in tuple(_watched):
            watcher(engine)


def unwatch(engine: Engine) -> None:
    """Undo `watch`."""
    if engine in _watched:
        event.remove(engine, "handle_error", _record_failure)
        for undo in _watchers.values():
            undo(engine)
        _dialects.discard(engine.dialect)
        _watched.discard(engine)


def refuse_if_aborted(connections: tuple[Connection, ...]) -> None:
    """Ask the database whether a transaction with a failed statement can still be committed.

    Raises:
        TransactionAborted: It cannot.
    """
    if failed_transactions:
        for connection in connections:
            _refuse_if_aborted(connection)


def _record_failure(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None:
        return
    if isinstance(context.original_exception, CancelledError) and connection.dialect.is_async:
        _discard(connection)
        return
    if context.is_disconnect:
        return
    transaction = connection.get_transaction()
    if _is_unusable_after(context, transaction):
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False
    elif transaction is not None:
        _remember(connection, transaction, context.original_exception)


def _is_unusable_after(context: ExceptionContext, transaction: Transaction | None) -> bool:
    """Whether nobody can know the state of the connection after this error."""
    ends_or_begins = context.statement is None and context.execution_context is None
    if ends_or_begins and not _was_answered(context.sqlalchemy_exception):
        # BEGIN, COMMIT or ROLLBACK never arrived. asyncpg, for one, then takes the transaction for
        # ended, and the pool would pass it on to the next request.
        return True
    if not isinstance(transaction, TwoPhaseTransaction):
        return False
    # A prepared transaction can be ended on another connection. If MariaDB refuses to end one, it
    # releases it only when the connection is closed. psycopg treats a failed PREPARE as successful.
    statement = context.statement
    return is_prepared(transaction) or statement is None or statement.startswith("XA ")


def _was_answered(error: Exception | None) -> bool:
    # The other two are the driver's own: it was busy, or does not know what the server did.
    return isinstance(error, DBAPIError) and not isinstance(error, InterfaceError | InternalError)


def _remember(connection: Connection, transaction: Transaction, error: BaseException) -> None:
    hidden = connection.engine.hide_parameters
    message = type(error).__name__ if hidden else " ".join(str(error).split())
    number = error.args[0] if error.args else None
    if connection.dialect.name in {"mysql", "mariadb"} and number in _ROLLING_BACK:
        failed_transactions[_key(transaction)] = message, True
    else:
        savepoint = connection.get_nested_transaction() or transaction
        failed_transactions.setdefault(_key(savepoint), (message, False))
    _listen_for_commit(connection)


def forbid_commit(connections: tuple[Connection, ...], error: Exception) -> None:
    """Refuse to commit these transactions, because a part of them could not be rolled back."""
    for connection in connections:
        transaction = connection.get_transaction()
        if transaction is not None:
            message = " ".join(str(getattr(error, "orig", error)).split())
            failed_transactions.setdefault(_key(transaction), (message, True))
            _listen_for_commit(connection)


def _listen_for_commit(connection: Connection) -> None:
    for name in ("commit", "prepare_twophase"):
        # On this connection alone: on an engine, such a listener slows down each statement.
        if not event.contains(connection, name, _refuse_at_the_last_moment):
            event.listen(connection, name, _refuse_at_the_last_moment)


def _key(transaction: Transaction) -> ref[Transaction]:
    return ref(transaction, lambda key: failed_transactions.pop(key, None))


def _refuse_if_aborted(connection: Connection) -> None:
    transaction = connection.get_transaction()
    found = failed_transactions.get(ref(transaction)) if transaction is not None else None
    if found is None:
        return
    database = without_secrets(connection.engine.url)
    message, is_rolled_back = found
    if is_rolled_back:
        raise TransactionAborted(database, message, rolled_back=True)
    try:
        # Only the database knows whether the error was fatal to the transaction.
        connection.execute(select(1))
    except DBAPIError as error:
        raise TransactionAborted(database, message) from error


def _refuse_at_the_last_moment(connection: Connection, *_xid: object) -> None:
    # What failed after `before_commit`: in a listener of the last flush, say, that swallowed it.
    try:
        _refuse_if_aborted(connection)
    except TransactionAborted:
        # To SQLAlchemy it is COMMIT that has failed, so SQLAlchemy would not roll back any more.
        if not isinstance(connection.get_transaction(), TwoPhaseTransaction):
            try:
                connection.dialect.do_rollback(connection.connection)
            except BaseException:  # cancelled: nobody knows whether ROLLBACK arrived
                _discard(connection)
                raise
        raise


def _discard(connection: Connection) -> None:
    """Throw away the connection of a cancelled operation.

    That takes awaits too, which a second cancellation would interrupt.
    """
    if connection.dialect.is_async:
        await_only(run_to_completion(greenlet_spawn(_throw_away, connection)))
    else:
        _throw_away(connection)


def _throw_away(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        # Closing is not enough: while a cursor waits for the garbage collector, a closed connection
        # still holds its locks. An error here must not take the place of the cancellation.
        with suppress(Exception):
            connection.dialect.do_rollback(connection.connection)
    connection.invalidate()
