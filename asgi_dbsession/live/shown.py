"""Converts lines of code, statements and database URLs to texts without secret values."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from asgi_dbsession.reports.call_site import CallSite

_LONGEST = 400
# Where a string (`'`, `$$`) or a comment (`--`, `/*`, in MySQL also `#`) begins in a statement.
# Strings and comments may have secret values.
_MARK = re.compile(r"'|--|/\*|\$(?:[A-Za-z_]\w*)?\$")
_MARK_OR_HASH = re.compile(_MARK.pattern + "|#")
# A number in a statement may be a secret value, so it is hidden. Numbers of parameters (`$1`,
# `:id_1`) and numbers in names are shown.
_NUMBER = re.compile(r"(?<![\w$:.%])\d[\w.]*")
# A text in double quotes. In SQLite and MySQL it may be a string, and so a secret. In all other
# databases it is a name.
_DOUBLE_QUOTED = re.compile(r'"[^"]*"|".*\Z', re.DOTALL)
_MYSQL = ("mysql", "mariadb")
_TEXT_IN_DOUBLE_QUOTES = ("sqlite", *_MYSQL)


def line(call_site: CallSite) -> str:
    """Return a line of code as the text `file:line`, or an empty text for None.

    The path of the file is relative to the working directory. For a file outside of this directory,
    only the last three parts of the path are shown.
    """
    if call_site is None:
        return ""
    file, number = call_site
    return f"{_short(file)}:{number}"


@lru_cache(1024)
def _short(file: str) -> str:
    path = Path(file)
    if path.is_relative_to(Path.cwd()) and ".." not in path.parts:
        return str(path.relative_to(Path.cwd()))
    return "/".join(path.parts[1:][-3:])


@lru_cache(1024)
def without_values(statement: str, dialect: str) -> str:
    """Hide the strings and numbers in a statement. Cut the statement at its first comment.

    The values of bound parameters are never in the text of a statement. But the application may
    have written a value into the text itself, and this value may be a secret.

    Args:
        statement: The SQL text.
        dialect: The name of the SQLAlchemy dialect. The meaning of double quotes depends on it.
    """
    marks = list((_MARK_OR_HASH if dialect in _MYSQL else _MARK).finditer(statement))
    shown = _cut(statement, marks, may_quote_twice=dialect in _TEXT_IN_DOUBLE_QUOTES)
    if dialect in _TEXT_IN_DOUBLE_QUOTES:
        shown = _DOUBLE_QUOTED.sub(_name_or_nothing, shown)
    shown = " ".join(_NUMBER.sub("?", shown).split())
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} …"


def _cut(statement: str, marks: list[re.Match[str]], *, may_quote_twice: bool) -> str:
    """Replace the text from the first to the last quote, or cut the statement at the first quote.

    How a string ends depends on the database and its settings, so nothing between the first and the
    last quote is shown. If the statement has comments or other kinds of quotes, nothing after the
    first quote or comment is shown.
    """
    if not marks:
        return statement
    first, last = marks[0].start(), marks[-1].end()
    has_quotes_only = all(each.group() == "'" for each in marks)
    if has_quotes_only and len(marks) % 2 == 0 and not (may_quote_twice and '"' in statement):
        return f"{statement[:first]}'…'{statement[last:]}"
    return f"{statement[:first]}…"


def _name_or_nothing(found: re.Match[str]) -> str:
    # A text in double quotes may be a secret value. But show names that are words of SQL, such as
    # "order": SQLAlchemy writes them in double quotes.
    return found.group() if found.group()[1:-1] in _QUOTED_NAMES else '"…"'


_QUOTED_NAMES = frozenset(
    ("check", "column", "desc", "group", "index", "key", "limit", "order", "table", "to", "values")
)


def name(database: Any) -> str:
    """Return the kind, host and name of a database, without its user, password and options."""
    url = database.url
    port = f":{url.port}" if url.port else ""
    place = f"{url.host}{port}/" if url.host else ""
    return f"{url.get_backend_name()} {place}{url.database or ''}".strip()
