"""Finds the line of the application that is using a session now."""

import sys
from importlib import import_module
from inspect import iscoroutinefunction
from typing import Any, TypeAlias

from sqlalchemy.ext.asyncio import AsyncSession

from asgi_dbsession.session.end import current_end

# The package greenlet has no type annotations. With a normal import, mypy would report an error.
_getcurrent: Any = import_module("greenlet").getcurrent

# Where code uses a session: the file and the line number. None if no such line was found.
CallSite: TypeAlias = tuple[str, int] | None

# A line in one of these packages is never reported as the line of the application.
_BETWEEN = frozenset(
    ("sqlalchemy", "asgi_dbsession", "sqlmodel", "greenlet", "contextlib", "functools", "asyncio")
)
# A cache: True for files of the application, False for all others. File names are faster keys than
# code objects, whose hash Python computes at each look-up.
_is_application: dict[str, bool] = {}
_MOST_FILES = 10_000
# `find_line` returns the line that called one of these async methods. `run_sync` is left out: the
# line to find is inside the function that `run_sync` calls.
_AWAITED = frozenset(
    method.__code__.co_qualname
    for name, method in vars(AsyncSession).items()
    if iscoroutinefunction(method) and name != "run_sync"
)
# The number of stack frames between `find_call_site` and the method of SQLAlchemy's `Connection`
# that led to this call. These frames are never code of the application. Skip them to save time.
_BELOW_CONNECTION = 4


def find_line() -> CallSite:
    """Return the line of the application that sent the statement that is running now.

    For an `AsyncSession`, this is the line that called the method of the session, even if a
    listener of the application has sent the statement inside this method.
    """
    try:
        method = _getcurrent().parent.gr_frame.f_back
        if method.f_code.co_qualname in _AWAITED:
            frame = method.f_back
            file = frame.f_code.co_filename
            if _is_application[file]:
                return file, frame.f_lineno
    # This shortcut, which looks only at the line that called the session, has failed. A sync
    # session has no greenlet (AttributeError). Or nobody has checked yet if the file of the line
    # belongs to the application (KeyError). So search the whole call stack for such a line.
    except (AttributeError, KeyError):
        pass
    return find_call_site()


def find_call_site() -> CallSite:
    """Return the innermost line of the application that led to the current database operation.

    Return None if the operation belongs to the commit or rollback at the end of a unit of work,
    because no line of the application called it.
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
    # Store whether this file belongs to the application. But code that is made at run time has a
    # file name such as `<string>`, which many modules share. For such a name, store nothing.
    if not file.startswith("<"):
        # An application may compile code at run time, each time with a new file name. So empty this
        # cache if it has too many file names.
        if len(_is_application) > _MOST_FILES:
            _is_application.clear()
        _is_application[file] = found
    return found


def as_text(call_site: CallSite) -> str | None:
    """Return a line of code as the text `file:line`, which editors and terminals make clickable."""
    return None if call_site is None else f"{call_site[0]}:{call_site[1]}"
