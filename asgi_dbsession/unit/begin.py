"""Opens a new unit of work for `database.begin()`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from asgi_dbsession.session.end import current_end

from .unit_of_work import SessionSource, UnitOfWork, current_unit


@contextmanager
def unit_of_its_own(database: SessionSource[Any], read_only: bool) -> Iterator[UnitOfWork]:
    """Open a unit of work for one database; it is the current unit of work in the `with` block.

    The code inside the `with` block must commit or roll back the unit of work, and close it.
    """
    around = current_unit.get()
    unit = around.within((database,)) if around is not None else UnitOfWork((database,), None, None)
    unit.read_only = read_only
    # A listener of the application may call `begin()` during the COMMIT of an outer unit of work.
    # The outer unit of work counts as closed already, but the listener still needs it. So do not
    # remove it then.
    if not current_end.get():
        _forget_hidden(unit)
    with made_current(unit):
        yield unit


@contextmanager
def made_current(unit: UnitOfWork) -> Iterator[None]:
    """Make `unit` the current unit of work (the one of `get_session()`) in the `with` block."""
    around = current_unit.get()
    was_closed = around is not None and around.closed
    current_unit.set(unit)
    try:
        yield
    finally:
        # A unit of work that was opened inside the `with` block may still be open, and is then
        # still the current one. Do not replace it.
        if current_unit.get() is unit:
            current_unit.set(around if was_closed else _nearest_open(around))


def _forget_hidden(unit: UnitOfWork) -> None:
    """Remove closed outer units of work that `get_session()` can no longer reach.

    A job may start the next job inside of its `begin()` block, and so on. Without this function,
    the closed units of work of such a chain would stay in memory.
    """
    hidden = set(unit.databases)
    while (enclosing := unit.enclosing) is not None:
        if enclosing.closed and hidden.issuperset(enclosing.databases):
            unit.enclosing = enclosing.enclosing
        else:
            hidden = {*enclosing.databases, *(hidden if enclosing.closed else ())}
            unit = enclosing


def _nearest_open(unit: UnitOfWork | None) -> UnitOfWork | None:
    """Return the nearest unit of work that is open, or the outermost one if all are closed.

    If the code then uses the closed unit of work, it gets the error SessionClosed, which explains
    the mistake.
    """
    while unit is not None and unit.closed and unit.enclosing is not None:
        unit = unit.enclosing
    return unit
