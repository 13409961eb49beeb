"""Makes text of lines, statements and databases, without a value in it."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from asgi_dbsession.reports.call_site import CallSite

_LONGEST = 400
# What begins a text or a comment: quotes of PostgreSQL, `--`, `/*`, and `#` of MySQL.
_MARK = re.compile(r"'|--|/\*|\$(?:[A-Za-z_]\w*)?\$")
_MARK_OR_HASH = re.compile(_MARK.pattern + "|#")
# Not the number of a parameter (`$1`, `:id_1`), nor of a name.
_NUMBER = re.compile(r"(?<![\w$:.%])\d[\w.]*")
# Where they may be a text; elsewhere they are a name.
_DOUBLE_QUOTED = re.compile(r'"[^"]*"|".*\Z', re.DOTALL)
_TEXT_IN_DOUBLE_QUOTES = ("sqlite", "mysql", "mariadb")


def line(call_site: CallSite) -> str:
    """A file and a line, from the folder that the process was started in; empty for None."""
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
    """A statement with each text and number in it replaced, and without its comments.

    SQLAlchemy leaves the values of parameters out. What is replaced here is what an application
    has written into the statement itself.

    Args:
        statement: As it was compiled.
        dialect: The name of its dialect, because quotes differ.
    """
    is_mysql = dialect in _TEXT_IN_DOUBLE_QUOTES[1:]
    marks = list((_MARK_OR_HASH if is_mysql else _MARK).finditer(statement))
    shown = _cut(statement, marks, may_quote_twice=dialect in _TEXT_IN_DOUBLE_QUOTES)
    if dialect in _TEXT_IN_DOUBLE_QUOTES:
        shown = _DOUBLE_QUOTED.sub(_name_or_nothing, shown)
    shown = " ".join(_NUMBER.sub("?", shown).split())
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} …"


def _cut(statement: str, marks: list[re.Match[str]], *, may_quote_twice: bool) -> str:
    """Replace all from the first quote to the last.

    Where a text ends depends on the dialect and its settings, so nothing between two quotes is
    shown. If there are comments, or other quotes, nothing behind the first of them is.
    """
    if not marks:
        return statement
    first, last = marks[0].start(), marks[-1].end()
    has_quotes_only = all(each.group() == "'" for each in marks)
    if has_quotes_only and len(marks) % 2 == 0 and not (may_quote_twice and '"' in statement):
        return f"{statement[:first]}'…'{statement[last:]}"
    return f"{statement[:first]}…"


def _name_or_nothing(found: re.Match[str]) -> str:
    # What SQLAlchemy quotes because it is a word of SQL.
    return found.group() if found.group()[1:-1] in _QUOTED_NAMES else '"…"'


_QUOTED_NAMES = frozenset(
    ("check", "column", "desc", "group", "index", "key", "limit", "order", "table", "to", "values")
)


def name(database: Any) -> str:
    """What kind of database it is, and where; without user, password and options."""
    url = database.url
    place = f"{url.host}/" if url.host else ""
    return f"{url.get_backend_name()} {place}{url.database or ''}".strip()
