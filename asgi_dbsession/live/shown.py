"""Makes text of lines, statements and databases, without a value in it."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from asgi_dbsession.reports.call_site import CallSite

_LONGEST = 400
_COMMENT = re.compile(r"/\*.*?(?:\*/|\Z)|--[^\n]*", re.DOTALL)
# From the first quote to the last: where a text ends depends on the dialect and its settings.
_TEXT = re.compile(r"'.*'|'.*|\$(?:[A-Za-z_]\w*)?\$.*", re.DOTALL)
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
    shown = _TEXT.sub("'…'", statement)
    shown = _COMMENT.sub(" ", shown)
    if dialect in _TEXT_IN_DOUBLE_QUOTES:
        shown = _DOUBLE_QUOTED.sub(_name_or_nothing, shown)
    if dialect in _TEXT_IN_DOUBLE_QUOTES[1:]:
        shown = re.sub(r"#[^\n]*", " ", shown)
    shown = " ".join(_NUMBER.sub("?", shown).split())
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} …"


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
