"""Converts lines, statements and databases into text without secret values."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from asgi_dbsession.reports.call_site import CallSite

_LONGEST = 400
# The characters that begin a string or a comment: quotes of PostgreSQL, `--`, `/*`, and `#` in
# MySQL.
_MARK = re.compile(r"'|--|/\*|\$(?:[A-Za-z_]\w*)?\$")
_MARK_OR_HASH = re.compile(_MARK.pattern + "|#")
# Hide numbers in a statement, which may be secret values, except numbers of parameters (`$1`,
# `:id_1`) and numbers in names.
_NUMBER = re.compile(r"(?<![\w$:.%])\d[\w.]*")
# Matches text in double quotes. In SQLite and MySQL, this text may be a string, which may be
# secret. In all other dialects, this text is a name.
_DOUBLE_QUOTED = re.compile(r'"[^"]*"|".*\Z', re.DOTALL)
_TEXT_IN_DOUBLE_QUOTES = ("sqlite", "mysql", "mariadb")


def line(call_site: CallSite) -> str:
    """Return the line of code `call_site` as the text `file:line`; an empty text for None.

    The file is relative to the working directory. Of a file outside of the working directory, only
    the last three parts of the path are shown.
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
    """Replace each string and number in a statement, and remove comments.

    SQLAlchemy sends the values of parameters separately. This function replaces values that the
    application wrote into the statement itself.

    Args:
        statement: The compiled statement.
        dialect: The name of the SQLAlchemy dialect, because the meaning of quotes depends on the
            dialect.
    """
    is_mysql = dialect in _TEXT_IN_DOUBLE_QUOTES[1:]
    marks = list((_MARK_OR_HASH if is_mysql else _MARK).finditer(statement))
    shown = _cut(statement, marks, may_quote_twice=dialect in _TEXT_IN_DOUBLE_QUOTES)
    if dialect in _TEXT_IN_DOUBLE_QUOTES:
        shown = _DOUBLE_QUOTED.sub(_name_or_nothing, shown)
    shown = " ".join(_NUMBER.sub("?", shown).split())
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} …"


def _cut(statement: str, marks: list[re.Match[str]], *, may_quote_twice: bool) -> str:
    """Replace everything from the first quote to the last quote.

    The end of a string depends on the dialect and its settings, so nothing between the first and
    the last quote is shown. If the statement has comments or other kinds of quotes, everything from
    the first quote or comment on is removed.
    """
    if not marks:
        return statement
    first, last = marks[0].start(), marks[-1].end()
    has_quotes_only = all(each.group() == "'" for each in marks)
    if has_quotes_only and len(marks) % 2 == 0 and not (may_quote_twice and '"' in statement):
        return f"{statement[:first]}'…'{statement[last:]}"
    return f"{statement[:first]}…"


def _name_or_nothing(found: re.Match[str]) -> str:
    # Show the names in `_QUOTED_NAMES`. SQLAlchemy writes these names in double quotes because they
    # are words of SQL, so they are not values.
    return found.group() if found.group()[1:-1] in _QUOTED_NAMES else '"…"'


_QUOTED_NAMES = frozenset(
    ("check", "column", "desc", "group", "index", "key", "limit", "order", "table", "to", "values")
)


def name(database: Any) -> str:
    """Return the kind, host and name of a database, without user, password and options."""
    url = database.url
    port = f":{url.port}" if url.port else ""
    place = f"{url.host}{port}/" if url.host else ""
    return f"{url.get_backend_name()} {place}{url.database or ''}".strip()
