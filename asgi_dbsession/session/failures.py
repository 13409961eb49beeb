"""Records failed statements. If a failure has aborted the transaction, COMMIT raises an error."""

from asyncio import CancelledError
from collections.abc import Callable
from traceback import clear_frames
from weakref import WeakSet, ref

from sqlalchemy import Connection, Engine, event, select
from sqlalchemy.engine import ExceptionContext, Transaction, TwoPhaseTransaction
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError

from asgi_dbsession.errors import TransactionAborted, without_secrets

from ._sqlalchemy import is_first, is_prepared, listen_first, original_engine, stop_listening
from .read_only import KEY
from .roll_back import discard, roll_back_or_discard
from .sqlite import end_failed_commit, unwatch_sqlite, was_rolled_back, watch_sqlite

# For each transaction or savepoint in which a statement failed: the driver's message, and True if
# the database has rolled back the whole transaction.
failed_transactions: dict[ref[Transaction], tuple[str, bool]] = {}

# The numbers of the errors at which InnoDB rolls back the whole transaction, and not only the
# statement: a deadlock, an outdated snapshot (MariaDB), and a full lock table. Source:
# https://dev.mysql.com/doc/refman/8.4/en/innodb-error-handling.html
_ROLLING_BACK = (1213, 1020, 1206)


# The engines whose failed statements are recorded.
_watched: WeakSet[Engine] = WeakSet()
# For each feature that listens to all engines (retries, for example): a function that adds its
# listeners to an engine, and one that removes these listeners.
_watchers: dict[Callable[[Engine], None], Callable[[Engine], None]] = {}


def watch(engine: Engine) -> None:
    """Start to record the failed statements of `engine`, before other listeners can hide errors."""
    engine = original_engine(engine)
    if engine not in _watched:
        listen_first(engine, "handle_error", _record_failure)
        watch_sqlite(engine)
        _watched.add(engine)
        for watcher in _watchers:
            watcher(engine)
    elif not is_first(engine, "handle_error", _record_failure):
        stop_listening(engine, "handle_error", _record_failure)
        listen_first(engine, "handle_error", _record_failure)


def is_watched_first(connection: Connection) -> bool:
    """Return True if this package's listener for errors comes before those of the application."""
    return is_first(connection, "handle_error", _record_failure)


def watch_all(watcher: Callable[[Engine], None], undo: Callable[[Engine], None]) -> None:
    """Call `watcher` once with each engine that this package uses now or later.

    Args:
        watcher: A function that adds listeners to the engine it is given.
        undo: A function that removes these listeners when this package stops using the engine.
    """
    if watcher not in _watchers:
        _watchers[watcher] = undo
        for engine in tuple(_watched):
            watcher(engine)


def unwatch(engine: Engine) -> None:
    """Remove the listeners that `watch` added.

    Args:
        engine: The original engine, not a copy that `Engine.execution_options` has made.
    """
    if engine in _watched:
        stop_listening(engine, "handle_error", _record_failure)
        unwatch_sqlite(engine)
        for undo in _watchers.values():
            undo(engine)
        _watched.discard(engine)


def refuse_if_aborted(connections: tuple[Connection, ...], *, of_savepoint: bool = False) -> None:
    """Raise an error before COMMIT if a failed statement has aborted the transaction.

    Before the release of a savepoint (`of_savepoint`), ignore failures inside the savepoint: the
    database itself refuses the release.

    Raises:
        TransactionAborted: COMMIT would store nothing.
    """
    for connection in connections if failed_transactions else ():
        # Find out if a statement has failed in the transaction, or in a savepoint that the
        # application has left open. (COMMIT ends such a savepoint too.)
        savepoint = None if of_savepoint else connection.get_nested_transaction()
        opened = [each for each in (connection.get_transaction(), savepoint) if each is not None]
        found = next(filter(None, (failed_transactions.get(ref(each)) for each in opened)), None)
        if found is None:
            continue
        database = without_secrets(connection.engine.url)
        message, is_rolled_back = found
        if is_rolled_back:
            # Raise an error. The database itself has rolled back the transaction. So it would
            # accept COMMIT without an error, although the writes of the transaction are lost.
            raise TransactionAborted(database, message, rolled_back=True)
        try:
            # Only the database knows if the failed statement has aborted the transaction. To find
            # out, send a SELECT: an aborted transaction refuses it.
            connection.execute(select(1))
        except DBAPIError as error:
            raise TransactionAborted(database, message) from error


def _record_failure(context: ExceptionContext) -> None:
    connection = context.connection
    # SQLAlchemy calls this listener twice if it was added to the engine, and later to the class
    # `Engine` too. If the first call has closed the connection, the second call does nothing.
    if connection is None or connection.invalidated:
        return
    if original_engine(connection.engine) not in _watched:
        return
    if isinstance(context.original_exception, CancelledError) and connection.dialect.is_async:
        # The task was cancelled during a statement. Close the connection if a transaction is open.
        # Otherwise leave the close to SQLAlchemy. When it opens the first connection of an engine,
        # it asks the server for its version without a transaction. If this listener closed that
        # connection, SQLAlchemy would raise an AssertionError instead of the CancelledError.
        if connection.in_transaction():
            # Clear the local variables of the traceback. In SQLAlchemy 2.0, one of them refers to
            # the open cursor. With aiosqlite, an open cursor keeps a lock on the database file.
            clear_frames(context.original_exception.__traceback__)
            discard(connection, getattr(context.execution_context, "cursor", None))
        return
    if context.is_disconnect:
        return
    transaction = connection.get_transaction()
    if _is_unusable_after(context, transaction):
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False
    elif transaction is not None:
        _remember(context, connection, transaction)
        read_only = connection.info.get(KEY)
        if read_only is not None:
            read_only.record_refusal(context)
        if context.statement is None and context.execution_context is None:
            end_failed_commit(connection)


def _is_unusable_after(context: ExceptionContext, transaction: Transaction | None) -> bool:
    """Return True if the connection must be closed: a transaction may be open after the error."""
    ends_or_begins = context.statement is None and context.execution_context is None
    if ends_or_begins and not _was_answered(context.sqlalchemy_exception):
        # The server did not answer BEGIN, COMMIT or ROLLBACK. So the transaction may still be open,
        # and the next request must not get this connection.
        return True
    if not isinstance(transaction, TwoPhaseTransaction):
        return False
    # After an error of a two-phase commit, close the connection: only then does MariaDB let another
    # connection end the prepared transaction.
    statement = context.statement
    return is_prepared(transaction) or statement is None or statement.startswith("XA ")


def _was_answered(error: Exception | None) -> bool:
    """Return True if the error comes from the server, and not from the driver."""
    # Return False for InterfaceError and InternalError. Drivers raise them without an answer from
    # the server, for example because the connection is busy with another statement.
    if not isinstance(error, DBAPIError) or isinstance(error, InterfaceError | InternalError):
        return False
    # If psycopg raises an error itself (after a cancelled COPY, for example), `sqlstate` is None.
    return getattr(error.orig, "sqlstate", "") is not None


def _remember(context: ExceptionContext, connection: Connection, transaction: Transaction) -> None:
    error = context.original_exception
    hidden = connection.engine.hide_parameters
    message = type(error).__name__ if hidden else " ".join(str(error).split())
    if _has_rolled_back(connection, error):
        failed_transactions[_key(transaction)] = message, True
    else:
        savepoint = connection.get_nested_transaction() or transaction
        if (context.statement or "").startswith("RELEASE SAVEPOINT"):
            # After a failed RELEASE SAVEPOINT, SQLAlchemy sends no ROLLBACK TO SAVEPOINT. So the
            # whole transaction stays aborted, and its COMMIT must fail.
            failed = failed_transactions.get(ref(savepoint), (message, False))
            failed_transactions.setdefault(_key(transaction), failed)
        failed_transactions.setdefault(_key(savepoint), (message, False))
    _listen_for_commit(connection)


def _has_rolled_back(connection: Connection, error: BaseException) -> bool:
    """Return True if the error made the database roll back the whole transaction."""
    if connection.dialect.name in {"mysql", "mariadb"}:
        return bool(error.args) and error.args[0] in _ROLLING_BACK
    return was_rolled_back(connection)


def forbid_commit(connections: tuple[Connection, ...], error: Exception) -> None:
    """Let a later COMMIT on these connections fail, because a rollback to a savepoint failed."""
    for connection in connections:
        transaction = connection.get_transaction()
        if transaction is not None:
            message = " ".join(str(getattr(error, "orig", error)).split())
            failed_transactions.setdefault(_key(transaction), (message, True))
            _listen_for_commit(connection)


def _listen_for_commit(connection: Connection) -> None:
    for name in ("commit", "prepare_twophase"):
        # Before COMMIT, call `_refuse_at_the_last_moment`, which raises an error if the transaction
        # is aborted. Add this listener only to a connection on which a statement has failed. A
        # listener on the engine would make each statement of all requests slower. SQLAlchemy
        # ignores the call if the connection has this listener already.
        event.listen(connection, name, _refuse_at_the_last_moment)


def _key(transaction: Transaction) -> ref[Transaction]:
    # Return a weak reference, so that `dict.pop` removes the entry when Python frees the
    # transaction. Do not use a Python function as this callback: a signal handler could run inside
    # it, and Python ignores exceptions (of Ctrl-C, for example) in callbacks of weak references.
    return ref(transaction, failed_transactions.pop)


def _refuse_at_the_last_moment(connection: Connection, *_xid: object) -> None:
    try:
        refuse_if_aborted((connection,))
    except TransactionAborted:
        # This listener raises an error before COMMIT is sent. SQLAlchemy takes it for an error of
        # COMMIT itself, and does not send ROLLBACK. So send ROLLBACK here.
        if not isinstance(connection.get_transaction(), TwoPhaseTransaction):
            roll_back_or_discard(connection)
        raise
