"""Opens a new unit of work for `database.begin()`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from asgi_dbsession.session.lock import current_end

from .unit_of_work import SessionSource, UnitOfWork, current_unit


@contextmanager
def unit_of_its_own(database: SessionSource[Any], read_only: bool) -> Iterator[UnitOfWork]:
    """Open a unit of work for one database, and make it the current unit inside the `with` block.

    The code inside the block must close the unit.
    """
    around = current_unit.get()
    unit = around.within((database,)) if around is not None else UnitOfWork((database,), None, None)
    unit.read_only = read_only
    # A listener may call `begin()` during the COMMIT of the outer unit, which counts as closed
    # already. Do not remove the outer unit then, because the listener still needs it.
    if not current_end.get():
        _forget_hidden(unit)
    with made_current(unit):
        yield unit


@contextmanager
def made_current(unit: UnitOfWork) -> Iterator[None]:
    """Make `unit` the current unit of work inside the `with` block."""
    around = current_unit.get()
    was_closed = around is not None and around.closed
    current_unit.set(unit)
    try:
        yield
    finally:
        # If another unit became the current unit inside the block, and is still open, keep it.
        if current_unit.get() is unit:
            current_unit.set(around if was_closed else _nearest_open(around))


def _forget_hidden(unit: UnitOfWork) -> None:
    """Remove closed outer units that `get_session()` can no longer reach.

    Otherwise a chain of jobs that each start the next job inside `begin()` would fill the memory.
    """
    hidden = set(unit.databases)
    while (enclosing := unit.enclosing) is not None:
        if enclosing.closed and hidden.issuperset(enclosing.databases):
            unit.enclosing = enclosing.enclosing
        else:
            hidden = {*enclosing.databases, *(hidden if enclosing.closed else ())}
            unit = enclosing


def _nearest_open(unit: UnitOfWork | None) -> UnitOfWork | None:
    """Return the nearest open unit, or the outermost unit if all units are closed.

    A use of the closed outermost unit raises SessionClosed, which explains the mistake.
    """
    while unit is not None and unit.closed and unit.enclosing is not None:
        unit = unit.enclosing
    return unit
