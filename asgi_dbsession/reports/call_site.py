"""Where in the application's code a session is being used."""

import sys
from importlib import import_module
from typing import Any, TypeAlias

# Not imported by name: it comes without types.
_greenlet: Any = import_module("greenlet")

# A code object's file and a line; made into text only where someone wants to read it.
Place: TypeAlias = tuple[str, int] | None

# Through what an application reaches its database.
_BETWEEN = frozenset(
    ("sqlalchemy", "asgi_dbsession", "sqlmodel", "greenlet", "contextlib", "functools", "asyncio")
)
# What ends a unit of work: no use of the application's, though its code may be further out.
_ENDS = ("asgi_dbsession.unit.unit_of_work", "asgi_dbsession.session.commit")


def place_of_use() -> Place:
    """The innermost line of the application that led here; None at the end of a unit of work."""
    frame: Any = sys._getframe(1)
    greenlet = _greenlet.getcurrent()
    while True:
        while frame is not None:
            name: str = frame.f_globals.get("__name__", "")
            if name in _ENDS:
                return None
            if name.partition(".")[0] not in _BETWEEN:
                return frame.f_code.co_filename, frame.f_lineno
            frame = frame.f_back
        greenlet = greenlet.parent
        if greenlet is None:
            return None
        frame = greenlet.gr_frame


def as_text(place: Place) -> str | None:
    """As editors and terminals know it: `file:line`."""
    return None if place is None else f"{place[0]}:{place[1]}"
