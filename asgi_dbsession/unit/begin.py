"""A unit of work of its own: for `database.begin()`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from asgi_dbsession.session.lock import current_end

from .unit_of_work import SessionSource, UnitOfWork, current_unit


@contextmanager
def unit_of_its_own(database: SessionSource[Any]) -> Iterator[UnitOfWork]:
    """A unit for one database, current inside of the block. The block must close it."""
    around = current_unit.get()
    unit = around.within((database,)) if around is not None else UnitOfWork((database,), None, None)
    if not current_end.get():  # a listener of a last flush is in a unit that is closed
        _forget_hidden(unit)
    with made_current(unit):
        yield unit


@contextmanager
def made_current(unit: UnitOfWork) -> Iterator[None]:
    """Make a unit the current one inside of the block."""
    around = current_unit.get()
    was_closed = around is not None and around.closed
    current_unit.set(unit)
    try:
        yield
    finally:
        if current_unit.get() is unit:  # else one that began later is still open
            current_unit.set(around if was_closed else _nearest_open(around))


def _forget_hidden(unit: UnitOfWork) -> None:
    """Let go of closed units around this one that no lookup can reach.

    If each job starts the next one inside its `begin()`, there would be ever more of them.
    """
    hidden = set(unit.databases)
    while (enclosing := unit.enclosing) is not None:
        if enclosing.closed and hidden.issuperset(enclosing.databases):
            unit.enclosing = enclosing.enclosing
        else:
            hidden = {*enclosing.databases, *(hidden if enclosing.closed else ())}
            unit = enclosing


def _nearest_open(unit: UnitOfWork | None) -> UnitOfWork | None:
    """The nearest unit that is open; or else the outermost, whose error says that it is closed."""
    while unit is not None and unit.closed and unit.enclosing is not None:
        unit = unit.enclosing
    return unit
