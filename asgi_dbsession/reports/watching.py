"""Has an engine tell what is asked of it."""

from time import perf_counter
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry

from .stats import Checkout, asking

# Where a connection keeps who has it.
_KEY = "asgi_dbsession.checkout"


def watch_usage(engine: Engine) -> None:
    """Have `engine` tell what is asked of it; watching twice is watching once."""
    event.listen(engine, "checkout", _check_out)
    event.listen(engine, "checkin", _check_in)
    event.listen(engine, "before_cursor_execute", _begin_statement)
    event.listen(engine, "after_cursor_execute", _done)
    event.listen(engine, "handle_error", _fail)
    for name in ("commit", "commit_twophase"):
        event.listen(engine, name, _begin_commit)
    event.listen(engine, "prepare_twophase", _begin_prepare)
    for name in ("rollback", "rollback_twophase"):
        event.listen(engine, name, _begin_rollback)


def _check_out(_connection: object, entry: ConnectionPoolEntry, _proxy: object) -> None:
    stats = asking.get()
    if stats is not None and stats.asked is not None:
        now = perf_counter()
        stats.stop_waiting(now)
        stats.asked = now  # a pool may take from another pool, and tell of both
        stats.checkout = entry.info[_KEY] = Checkout(stats, now, entry)


def _check_in(_connection: object, entry: ConnectionPoolEntry) -> None:
    checkout: Checkout | None = entry.info.pop(_KEY, None)
    if checkout is not None:
        checkout.give_back()


def _checkout_of(connection: Connection | None) -> Checkout | None:
    # One that was thrown away would be replaced by the mere question.
    if connection is None or connection.closed or connection.invalidated:
        return None
    checkout: Checkout | None = connection.info.get(_KEY)
    return checkout


def _begin_statement(
    connection: Connection, _cursor: object, statement: str, _values: object, context: Any, _: bool
) -> None:
    checkout = _checkout_of(connection)
    if checkout is not None:
        checkout.stats.tally.statements += 1
        # With values in it, a list (`IN`) would make another statement for each length.
        compiled = getattr(context, "compiled", None)
        checkout.begin(connection, "statement", compiled.string if compiled else statement)


def _begin_commit(connection: Connection, *_: object) -> None:
    checkout = _checkout_of(connection)
    if checkout is not None:
        checkout.stats.tally.commits += 1
        checkout.is_committing = True
        checkout.begin(connection, "commit")


def _begin_prepare(connection: Connection, *_: object) -> None:
    checkout = _checkout_of(connection)
    if checkout is not None:
        checkout.begin(connection, "commit")


def _begin_rollback(connection: Connection, *_: object) -> None:
    checkout = _checkout_of(connection)
    if checkout is not None:
        checkout.begin(connection, "rollback")


def _done(connection: Connection, *_: object) -> None:
    checkout = _checkout_of(connection)
    if checkout is not None:
        checkout.done()


def _fail(context: ExceptionContext) -> None:
    checkout = _checkout_of(context.connection)
    if checkout is not None:
        checkout.done()
        checkout.stats.tally.commits -= checkout.is_committing
        checkout.is_committing = False
