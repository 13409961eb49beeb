"""Adds measurements of statements and connections to an engine."""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine, event
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import ConnectionPoolEntry

from .call_site import find_call_site
from .stats import Checkout, asking
from .tally import Kind

# The key of `connection.info` for the `Checkout` object of the connection.
_KEY = "asgi_dbsession.checkout"
_watched: WeakSet[Dialect] = WeakSet()


def watch_usage(engine: Engine) -> None:
    """Measure the operations of `engine`; a second call for the engine does nothing.

    This function wraps methods of the dialect, because SQLAlchemy's connection events would take
    three times as much time in each request.
    """
    event.listen(engine, "checkout", _check_out)
    event.listen(engine, "checkin", _check_in)
    dialect: Any = engine.dialect
    if dialect in _watched:
        return
    _watched.add(dialect)
    for name, wrap in _WRAPPERS.items():
        setattr(dialect, name, partial(wrap, dialect, name))


def unwatch_usage(engine: Engine) -> None:
    """Remove the measurements that `watch_usage` added to `engine`."""
    if event.contains(engine, "checkout", _check_out):
        event.remove(engine, "checkout", _check_out)
        event.remove(engine, "checkin", _check_in)
    if engine.dialect in _watched:
        _watched.discard(engine.dialect)
        for name in _WRAPPERS:
            delattr(engine.dialect, name)


def _check_out(_connection: object, entry: ConnectionPoolEntry, _proxy: object) -> None:
    stats = asking.get()
    if stats is not None and stats.asked is not None:
        now = perf_counter()
        stats.stop_waiting(now)
        # A pool may take its connections from another pool. Then both pools report the checkout,
        # and the wait continues until the second report. So measure this part of the wait from now.
        stats.asked = now
        stats.checkout = entry.info[_KEY] = Checkout(stats, now, entry)


def _check_in(_connection: object, entry: ConnectionPoolEntry) -> None:
    checkout: Checkout | None = entry.info.pop(_KEY, None)
    if checkout is not None:
        checkout.give_back()


def _execute(dialect: Any, name: str, cursor: Any, statement: str, *values: Any) -> None:
    # Look up the method at each call, because tests may replace the class of the dialect.
    method = getattr(type(dialect), name)
    context: Any = values[-1]
    checkout = _checkout_of(context.root_connection) if context is not None else None
    if checkout is None:
        method(dialect, cursor, statement, *values)
        return
    checkout.begin_statement(context, statement)
    try:
        method(dialect, cursor, statement, *values)
    finally:
        checkout.done()


def _end(dialect: Any, name: str, connection: Any, *args: Any, **options: Any) -> None:
    method = getattr(type(dialect), name)
    checkout = _checkout_of(connection)
    # The pool sends ROLLBACK whenever a connection is returned. Count this ROLLBACK only if a
    # transaction was open.
    if checkout is None or not checkout.in_transaction:
        method(dialect, connection, *args, **options)
        return
    if checkout.is_in_autocommit:  # there is no transaction, so nothing is sent to the server
        checkout.record_idle(perf_counter(), find_call_site())
        method(dialect, connection, *args, **options)
    else:
        kind: Kind = "rollback" if "rollback" in name else "commit"
        checkout.begin(kind, "", find_call_site())
        try:
            method(dialect, connection, *args, **options)
        finally:
            checkout.done()
    if name != "do_prepare_twophase":
        checkout.in_transaction = False
        checkout.stats.tally.commits += "commit" in name


def _checkout_of(connection: Any) -> Checkout | None:
    try:
        checkout: Checkout | None = connection.info.get(_KEY)
    # SQLAlchemy opens the first connection of an engine without a session, so nothing is measured.
    except NotImplementedError:
        return None
    return checkout


_WRAPPERS: dict[str, Callable[..., None]] = {
    "do_execute": _execute,
    "do_executemany": _execute,
    "do_execute_no_params": _execute,
    "do_commit": _end,
    "do_rollback": _end,
    "do_prepare_twophase": _end,
    "do_commit_twophase": _end,
    "do_rollback_twophase": _end,
}
