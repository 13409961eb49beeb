"""Finds the line of the application that uses a session."""

import sys
from importlib import import_module
from inspect import iscoroutinefunction
from typing import Any, TypeAlias

from sqlalchemy.ext.asyncio import AsyncSession

from asgi_dbsession.session.lock import current_end

# Import greenlet with `import_module`: it has no type annotations, so mypy refuses `import`.
_getcurrent: Any = import_module("greenlet").getcurrent

# The file and the line number of code that uses a session. The text `file:line` is made only when
# it is shown, which saves time.
CallSite: TypeAlias = tuple[str, int] | None

# The packages between the application and the database, whose lines are never reported.
_BETWEEN = frozenset(
    ("sqlalchemy", "asgi_dbsession", "sqlmodel", "greenlet", "contextlib", "functools", "asyncio")
)
# For each file: True if it belongs to the application. A lookup by code object would be slower,
# because Python computes the hash of a code object each time.
_is_application: dict[str, bool] = {}
_MOST_FILES = 10_000
# The methods of `AsyncSession` that run a method of SQLAlchemy in a greenlet. `run_sync` runs a
# function of the application there.
_AWAITED = frozenset(
    method.__code__.co_qualname
    for name, method in vars(AsyncSession).items()
    if iscoroutinefunction(method) and name != "run_sync"
)
# How many stack frames lie between `find_call_site` and the method of SQLAlchemy's `Connection`.
# These frames never belong to the application, so skipping them saves time.
_BELOW_CONNECTION = 4


def find_line() -> CallSite:
    """Return the line of the application that led to the running statement.

    For an operation of an `AsyncSession`, this is the line that calls the operation. Listeners that
    run inside of the operation are not searched, which saves time.
    """
    try:
        method = _getcurrent().parent.gr_frame.f_back
        if method.f_code.co_qualname in _AWAITED:
            frame = method.f_back
            file = frame.f_code.co_filename
            if _is_application[file]:
                return file, frame.f_lineno
    # In a sync session, there is no other greenlet; or this file is not known yet.
    except (AttributeError, KeyError):
        pass
    return find_call_site()


def find_call_site() -> CallSite:
    """Return the innermost line of the application that led to the running database operation.

    Return None during the commit or rollback at the end of a unit of work, which no line of the
    application requests.
    """
    if current_end.get() is not None:
        return None
    greenlet: Any = _getcurrent()
    frame: Any = sys._getframe(_BELOW_CONNECTION)
    while True:
        while frame is not None:
            file = frame.f_code.co_filename
            found = _is_application.get(file)
            if found is None:
                found = _classify(file, frame.f_globals.get("__name__", ""))
            if found:
                return file, frame.f_lineno
            frame = frame.f_back
        greenlet = greenlet.parent
        if greenlet is None:
            return None
        frame = greenlet.gr_frame


def _classify(file: str, module: str) -> bool:
    found = module.partition(".")[0] not in _BETWEEN
    # Code that is made at run time has a name like `<string>`, which many modules share.
    if not file.startswith("<"):
        # Empty the cache if it is too large, because some applications make up file names.
        if len(_is_application) > _MOST_FILES:
            _is_application.clear()
        _is_application[file] = found
    return found


def as_text(call_site: CallSite) -> str | None:
    """Return the line as `file:line`, which editors and terminals make clickable."""
    return None if call_site is None else f"{call_site[0]}:{call_site[1]}"
