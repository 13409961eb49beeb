"""Which line of the application uses a session."""

import sys
from importlib import import_module
from types import CodeType
from typing import Any, TypeAlias

from asgi_dbsession.session.lock import current_end

# Not imported by name: it comes without types.
_greenlet: Any = import_module("greenlet")

# A file and a line; made into text only where somebody reads it.
CallSite: TypeAlias = tuple[str, int] | None

# Through what an application reaches its database.
_BETWEEN = frozenset(
    ("sqlalchemy", "asgi_dbsession", "sqlmodel", "greenlet", "contextlib", "functools", "asyncio")
)
# Whether code is of the application, by code object: to ask for its module each time is slow.
_is_application: dict[CodeType, bool] = {}
_MOST_CODE = 10_000
# The number of frames from here to SQLAlchemy's `exec_driver_sql`. Skipping them is faster than
# looking at each.
_NEVER_APPLICATION = 6


def find_call_site() -> CallSite:
    """The innermost line of the application that led here; None at the end of a unit of work.

    There, the application's code may be further out, but does not use the session.
    """
    if current_end.get() is not None:
        return None
    frame: Any = sys._getframe(_NEVER_APPLICATION)
    greenlet = _greenlet.getcurrent()
    while True:
        while frame is not None:
            code = frame.f_code
            found = _is_application.get(code)
            if found is None:
                found = _remember(code, frame.f_globals.get("__name__", ""))
            if found:
                return code.co_filename, frame.f_lineno
            frame = frame.f_back
        greenlet = greenlet.parent
        if greenlet is None:
            return None
        frame = greenlet.gr_frame


def _remember(code: CodeType, module: str) -> bool:
    if len(_is_application) > _MOST_CODE:  # code that is made at run time, and thrown away
        _is_application.clear()
    found = _is_application[code] = module.partition(".")[0] not in _BETWEEN
    return found


def as_text(call_site: CallSite) -> str | None:
    """As editors and terminals know it: `file:line`."""
    return None if call_site is None else f"{call_site[0]}:{call_site[1]}"
