"""Which line of the application uses a session."""

import sys
from importlib import import_module
from typing import Any, TypeAlias

# Not imported by name: it comes without types.
_greenlet: Any = import_module("greenlet")

# A file and a line; made into text only where somebody reads it.
CallSite: TypeAlias = tuple[str, int] | None

# Through what an application reaches its database.
_BETWEEN = frozenset(
    ("sqlalchemy", "asgi_dbsession", "sqlmodel", "greenlet", "contextlib", "functools", "asyncio")
)
# What ends a unit of work. The application's code may be further out, but does not use the session.
_ENDS = ("asgi_dbsession.unit.ending", "asgi_dbsession.session.managed")


def find_call_site() -> CallSite:
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


def as_text(call_site: CallSite) -> str | None:
    """As editors and terminals know it: `file:line`."""
    return None if call_site is None else f"{call_site[0]}:{call_site[1]}"
