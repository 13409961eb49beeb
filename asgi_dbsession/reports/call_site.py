"""Finds the line of the application that uses a session."""

import sys
from importlib import import_module
from types import CodeType
from typing import Any, TypeAlias

from asgi_dbsession.session.lock import current_end

# Import greenlet with `import_module`: it has no type annotations, so mypy refuses `import`.
_greenlet: Any = import_module("greenlet")

# The file and the line number of code that uses a session. The text `file:line` is made only when
# it is shown, which saves time.
CallSite: TypeAlias = tuple[str, int] | None

# The packages between the application and the database, whose lines are never reported.
_BETWEEN = frozenset(
    ("sqlalchemy", "asgi_dbsession", "sqlmodel", "greenlet", "contextlib", "functools", "asyncio")
)
# For each code object: True if it belongs to the application. This cache saves finding the module
# of a frame again, which is slow.
_is_application: dict[CodeType, bool] = {}
_MOST_CODE = 10_000
# How many stack frames lie between `find_call_site` and a method of SQLAlchemy's `Connection`.
# These frames never belong to the application, so skipping these frames saves time.
_BELOW_COMMIT = 5
BELOW_EXECUTE = 8


def find_call_site(skip: int = _BELOW_COMMIT) -> CallSite:
    """Return the innermost line of the application that led to the running database operation.

    Return None during the commit or rollback at the end of a unit of work, which no line of the
    application requests.

    Args:
        skip: How many stack frames to skip, because they never belong to the application.
    """
    if current_end.get() is not None:
        return None
    frame: Any = sys._getframe(skip)
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
    # Empty the cache if it is too large, because some applications create code objects at run time.
    if len(_is_application) > _MOST_CODE:
        _is_application.clear()
    found = _is_application[code] = module.partition(".")[0] not in _BETWEEN
    return found


def as_text(call_site: CallSite) -> str | None:
    """Return the line as `file:line`, which editors and terminals make clickable."""
    return None if call_site is None else f"{call_site[0]}:{call_site[1]}"
