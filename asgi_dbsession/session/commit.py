"""How the work of one session ends: whole or not at all, and never silently."""

from asyncio import CancelledError
from contextlib import suppress
from weakref import WeakSet, ref

from sqlalchemy import Connection, Engine, event, select
from sqlalchemy.engine import Dialect, ExceptionContext, Transaction, TwoPhaseTransaction
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from asgi_dbsession.database.url import without_secrets
from asgi_dbsession.errors import TransactionAborted

from .completion import run_to_completion
from .guard import SessionInTurn
from .lock import Turn
from .two_phases import costs_its_connection

# The dialects of the engines that are watched: what a copy of an engine with other options shares.
watched: WeakSet[Dialect] = WeakSet()

# Transactions in which a statement failed: what it said, and whether the database then rolled all
# of it back by itself. To it, whatever follows is another transaction, so asking it would find
# nothing wrong. A savepoint is a transaction of its own: rolling back to it leaves its mark behind.
# Not a WeakKeyDictionary: each COMMIT asks whether there is any, which that one answers slowly.
_failed: dict[ref[Transaction], tuple[str, bool]] = {}

# The errors at which InnoDB rolls back everything, savepoints included: a deadlock, a snapshot that
# is out of date (MariaDB), a lock table that is full.
# Source: https://dev.mysql.com/doc/refman/8.4/en/innodb-error-handling.html
_UNDOING = (1213, 1020, 1206)


def has_work(session: Session, turn: Turn) -> bool:
    """Whether there is anything to commit or roll back, or an operation in flight."""
    return _is_unfinished(session, turn) or turn.is_busy


def close_at_once(session: Session, turn: Turn) -> bool:
    """Close a session that has no work, without talking to the database.

    Returns:
        False when it has some after all: `end` must be used.
    """
    if not turn.take_to_end_if_free():
        return False
    idle = not _is_unfinished(session, turn)
    try:
        # Without objects to let go of, all that is left to do is to let nothing begin.
        if idle and (list(session) or type(session).close is not SessionInTurn.close):
            session.close()
    finally:
        turn.give(over=idle)
    return idle


def begin_end(session: Session, turn: Turn) -> None:
    """Do what can fail before COMMIT: flush, and prepare what is in two phases.

    The turn is kept until `end` is called; where this fails, all is rolled back, and it is not.

    Raises:
        TransactionAborted: An error was swallowed that had aborted the transaction.
        Exception: Whatever flush and PREPARE raised.
    """
    turn.take_to_end()
    try:
        # What SQLAlchemy's own COMMIT does first. `Session.prepare` would be the public way, but is
        # for two phases only, and refuses open savepoints.
        (session.get_transaction() or session.begin())._prepare_impl()
        if not session.twophase:  # else it was asked right before PREPARE, and cannot be any more
            _refuse_if_aborted(session)
    except BaseException:
        try:
            _roll_back(session)
        finally:
            turn.give()
        raise
    turn.keep()


def end(session: Session, turn: Turn, commit: bool, close: bool, begun: bool = False) -> None:
    """Commit or roll back what the session has begun, once the operation in flight is done.

    Whatever happens, the connection is back in its pool afterwards, or thrown away.

    Args:
        session: Also flushed by a commit. Usable again afterwards, as a new unit of work.
        turn: The turn on that session.
        commit: False rolls back.
        close: Ends the session for good.
        begun: Whether `begin_end` has been called, and kept the turn.

    Raises:
        TransactionAborted: An error was swallowed that had aborted the transaction.
        Exception: Whatever flush and COMMIT raised; everything was rolled back.
    """
    if begun:
        turn.go_on_ending()
    else:
        turn.take_to_end()
    try:
        if not commit:
            _roll_back(session)
        elif session.twophase and not begun:
            _commit_alone(session)
        else:
            session.commit()
    except BaseException:
        # close() alone would hand the pool a connection that is still inside the transaction
        # (SQLite): the next request would see rows that do not exist.
        if commit:
            _roll_back(session)
        raise
    finally:
        try:
            if close:
                session.close()
        finally:
            turn.give(over=close)


def watch(engine: Engine) -> None:
    """Have `engine` notice what would be lost in silence; watching twice is watching once."""
    event.listen(engine, "handle_error", _note_failure)
    watched.add(engine.dialect)


def unwatch(engine: Engine) -> None:
    """Undo `watch`, on an engine that goes on without this package."""
    if event.contains(engine, "handle_error", _note_failure):
        event.remove(engine, "handle_error", _note_failure)
    watched.discard(engine.dialect)


def _is_unfinished(session: Session, turn: Turn) -> bool:
    # in_transaction() knows of flushed and Core writes; the others of what another task changed
    # or added while an earlier COMMIT was under way.
    return (
        session.in_transaction()
        or session.identity_map.check_modified()
        or (bool(turn.workers) and bool(session.new))
    )


def _commit_alone(session: Session) -> None:
    if len(_open_connections(session)) == 1:
        # Nobody to agree with: in one phase it is stored sooner, and nothing can be left in doubt.
        session.twophase = False
    try:
        session.commit()
    finally:
        session.twophase = True


def _roll_back(session: Session) -> None:
    try:
        session.rollback()
    except Exception:
        # SQLAlchemy has thrown a dead connection away, so the server rolls back by itself.
        if session.in_transaction():
            session.invalidate()


def _note_failure(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None:
        return
    if isinstance(context.original_exception, CancelledError) and connection.dialect.is_async:
        _discard(connection)
        return
    if context.is_disconnect:
        return
    error = context.sqlalchemy_exception
    ends_or_begins = context.statement is None and context.execution_context is None
    if ends_or_begins and not _was_answered(error):
        # BEGIN, COMMIT or ROLLBACK never got through: asyncpg, for one, then counts the transaction
        # as over, and the pool would pass it on to the next request.
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False
        return
    transaction = connection.get_transaction()
    if transaction is None:
        return
    if costs_its_connection(transaction, context.statement):
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False
        return
    said = " ".join(str(context.original_exception).split())
    if _undoes_everything(connection, context.original_exception):
        _failed[_mark_of(transaction)] = said, True
    else:
        savepoint = connection.get_nested_transaction() or transaction
        _failed.setdefault(_mark_of(savepoint), (said, False))
    for name in ("commit", "prepare_twophase"):
        # On this connection alone: on an engine, such a listener slows down each statement.
        if not event.contains(connection, name, _refuse_at_the_last_moment):
            event.listen(connection, name, _refuse_at_the_last_moment)


def _mark_of(transaction: Transaction) -> ref[Transaction]:
    return ref(transaction, lambda mark: _failed.pop(mark, None))


def _discard(connection: Connection) -> None:
    # A cancelled operation costs its connection, and throwing that away takes awaits too, which a
    # second cancellation would interrupt.
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


def _undoes_everything(connection: Connection, error: BaseException) -> bool:
    number = error.args[0] if error.args else None
    return connection.dialect.name in {"mysql", "mariadb"} and number in _UNDOING


def _was_answered(error: Exception | None) -> bool:
    # The other two are the driver's own: it was busy, or lost track of where the server is.
    return isinstance(error, DBAPIError) and not isinstance(error, InterfaceError | InternalError)


def _remember_connection(
    session: SessionInTurn, _transaction: object, connection: Connection
) -> None:
    if connection.engine is not session.bind and connection.dialect not in watched:
        watch(connection.engine)  # one of the application's own: of `binds`, of `bind_arguments`
    held = [each for each in session._connections if not each.closed and each is not connection]
    session._connections = (*held, connection)


def _open_connections(session: Session) -> list[Connection]:
    return [each for each in getattr(session, "_connections", ()) if not each.closed]


def _refuse_if_aborted(session: Session) -> None:
    if not _failed:
        return
    for connection in getattr(session, "_connections", ()):
        _refuse_if_lost(connection)


def _refuse_at_the_last_moment(connection: Connection, *_xid: object) -> None:
    # What failed after `before_commit`: in a listener of the last flush, say, that swallowed it.
    try:
        _refuse_if_lost(connection)
    except TransactionAborted:
        # To SQLAlchemy it is COMMIT that has failed, and so it would not roll back any more.
        if not isinstance(connection.get_transaction(), TwoPhaseTransaction):
            try:
                connection.dialect.do_rollback(connection.connection)
            except BaseException:  # cancelled: nobody knows whether it came through
                _discard(connection)
                raise
        raise


def _refuse_if_lost(connection: Connection) -> None:
    transaction = connection.get_transaction()
    found = _failed.get(ref(transaction)) if transaction is not None else None
    if found is None:
        return
    database = without_secrets(connection.engine.url)
    said, is_undone = found
    if is_undone:
        raise TransactionAborted(database, said, undone=True)
    try:
        # Only the database knows whether the error was fatal to the transaction: ask it.
        connection.execute(select(1))
    except DBAPIError as error:
        raise TransactionAborted(database, said) from error


event.listen(SessionInTurn, "after_begin", _remember_connection)
event.listen(SessionInTurn, "before_commit", _refuse_if_aborted)
