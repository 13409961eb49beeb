"""Finds passwords and other secrets in texts, so that they are never shown."""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

from sqlalchemy import URL

_SECRET_NAMES = re.compile(
    r"pass(?!file)|pwd|secret|token|credential|api_?key|access_?key", re.IGNORECASE
)
# A secret that has fewer characters than this number may be a part of common words. So search only
# for whole words. If all texts with such common words were hidden, a reader could guess the secret.
_SHORTEST_PART = 4


def secrets_of(url: URL, engine_options: Mapping[str, Any]) -> set[str]:
    """Return all values that must not be shown: passwords, and options named like a secret."""
    found = {str(url.password or ""), (url.username or "").partition(":")[2]}
    arguments = engine_options.get("connect_args")
    for options in (url.query, engine_options, arguments if isinstance(arguments, dict) else {}):
        found |= set(_secrets_in(options))
    encoded = {write(each) for each in found for write in (quote, quote_plus, _quote_all)}
    return (found | encoded) - {""}


def tells_a_secret(text: str, secrets: set[str]) -> bool:
    """Return True if the text contains a secret; a short secret counts only as a whole word."""
    for secret in secrets:
        part = re.escape(secret)
        pattern = part if len(secret) >= _SHORTEST_PART else rf"(?<!\w){part}(?!\w)"
        if re.search(pattern, text):
            return True
    # Also find the password in the URL of another database, which is not in `secrets`.
    return re.search(r"://[^\s/@]*:(?!\*\*\*@)[^\s@]*@", text) is not None


def _secrets_in(options: Mapping[Any, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(name, str) and _SECRET_NAMES.search(name) and isinstance(value, str):
            yield value


def _quote_all(text: str) -> str:
    return quote(text, safe="")
