"""The unit of work that the caller is in, and what an application may tell it."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import iscoroutinefunction
from typing import Any

from asgi_dbsession.errors import NoSession, SessionClosed
from asgi_dbsession.session.lock import current_end, current_task

from .after_commit import AfterCommit, Function, is_in_thread, refusal_to_await
from .managed_session import SessionSource
from .unit_of_work import UnitOfWork, current_unit


def unit_that_manages(database: SessionSource[Any]) -> UnitOfWork:
    """The nearest unit of work that has a session of the database.

    Raises:
        NoSession: There is none here.
    """
    unit = current_unit.get()
    while unit is not None:
        if unit.manages(database):
            return unit
        unit = unit.enclosing
    raise NoSession(database)


@contextmanager
def unit_of_its_own(database: SessionSource[Any]) -> Iterator[UnitOfWork]:
    """A unit for one database, current inside of the block; ending it is left to the block."""
    around = current_unit.get()
    was_over = around is not None and around.over
    unit = around.within((database,)) if around is not None else UnitOfWork((database,), None, None)
    if not current_end.get():  # a listener of a last flush is in a unit that is over
        _forget_hidden(unit)
    current_unit.set(unit)
    try:
        yield unit
    finally:
        if current_unit.get() is unit:  # else one that began later is still open
            current_unit.set(around if was_over else _nearest_open(around))


def set_rollback(rollback: bool) -> None:
    """Decide how the current unit of work ends, whatever the status of the response says.

    Args:
        rollback: True rolls back also on success; False commits also on a status of 400 and
            above (a failed login that must be counted, say). An exception that nobody turns into
            a response rolls back in any case.

    Raises:
        NoSession: No unit of work is open here.
        SessionClosed: The request that this task belongs to is over.
    """
    unit, decider = _unit(), current_task()
    while True:
        unit.is_used, unit.rollback, unit.decider = True, rollback, decider
        if not unit.joins or unit.enclosing is None:
            break
        unit = unit.enclosing


def on_commit(function: Function) -> None:
    """Call a function once the work of the current unit is stored, and before the client hears.

    It is dropped when that work is rolled back, be it by the application, and be it only to a
    savepoint that was open when it was given; so give it after the work it belongs to. Where the
    application commits by itself, it is called when the unit of work ends.

    They are called in order and run to completion although the request is cancelled. What one
    raises is logged by the logger `asgi_dbsession`: it neither unmakes the COMMIT nor skips the
    others. Each has a unit of work of its own: `get_session()` is another session there, committed
    when the function returns, and followed up by the functions that it gives itself.

    Args:
        function: Takes no arguments. A coroutine function is awaited; a plain one is called where
            it was given: on the event loop, or, by a `def` handler, in a worker thread.

    Raises:
        NoSession: No unit of work is open here.
        SessionClosed: The request that this task belongs to is over.
        ConfigurationError: It is a coroutine function, and the unit is `SyncDatabase.begin()`.
    """
    unit = _unit(also_at_end=True)
    if unit.is_blocking and iscoroutinefunction(function):
        raise refusal_to_await(function)
    in_thread = not unit.is_blocking and is_in_thread()
    after_commit = AfterCommit(function, unit.visible_databases, in_thread)
    while True:
        for opened in tuple(unit.sessions.values()):  # a thread may open another meanwhile
            after_commit.follow(opened.orm)
        if not unit.joins or unit.enclosing is None:
            break
        unit = unit.enclosing
    unit.is_used, unit.after_commit = True, (*unit.after_commit, after_commit)


def _unit(*, also_at_end: bool = False) -> UnitOfWork:
    unit = current_unit.get()
    if unit is None:
        raise NoSession("any database")
    # A listener of its last flush; not a task that such a listener has made, and that outlives it.
    if unit.over and not (also_at_end and current_end.get() and unit.sessions):
        raise SessionClosed("any database")
    return unit


def _forget_hidden(unit: UnitOfWork) -> None:
    """Let go of finished units around this one that no lookup can reach.

    Where each job starts the next one inside its `begin()`, there would be ever more of them.
    """
    hidden = set(unit.databases)
    while (enclosing := unit.enclosing) is not None:
        if enclosing.over and hidden.issuperset(enclosing.databases):
            unit.enclosing = enclosing.enclosing
        else:
            hidden = {*enclosing.databases, *(hidden if enclosing.over else ())}
            unit = enclosing


def _nearest_open(unit: UnitOfWork | None) -> UnitOfWork | None:
    """The nearest unit that is not over; or else the outermost, whose error says so."""
    while unit is not None and unit.over and unit.enclosing is not None:
        unit = unit.enclosing
    return unit
