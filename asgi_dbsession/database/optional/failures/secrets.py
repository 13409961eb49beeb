"""Finds passwords and other secrets in texts, so that no error or log line shows them."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import quote, quote_plus

from sqlalchemy import URL

_SECRET_NAMES = re.compile(
    r"pass(?!file)|pwd|secret|token|credential|api_?key|access_?key", re.IGNORECASE
)
# Search for shorter secrets only as whole words. Otherwise the secret `app` would hide every text
# with the word `apply`, and so be easy to guess.
_SHORTEST_PART = 4


def secrets_of(url: URL, engine_options: Mapping[str, Any]) -> set[str]:
    """Return all values that must not be shown: passwords, and options such as `token`."""
    found = {str(url.password or ""), (url.username or "").partition(":")[2]}
    arguments = engine_options.get("connect_args")
    for options in (url.query, engine_options, arguments if isinstance(arguments, dict) else {}):
        for name, value in options.items():
            if isinstance(name, str) and _SECRET_NAMES.search(name) and isinstance(value, str):
                found.add(value)
    writings = (quote, quote_plus, partial(quote, safe=""))
    encoded = {write(each) for each in found for write in writings}
    return (found | encoded) - {""}


def tells_a_secret(text: str, secrets: set[str]) -> bool:
    """Return True if the text contains a secret. A short secret must be a whole word in it."""
    for secret in secrets:
        part = re.escape(secret)
        pattern = part if len(secret) >= _SHORTEST_PART else rf"(?<!\w){part}(?!\w)"
        if re.search(pattern, text):
            return True
    # The text may show the URL of another database, whose password is not in `secrets`. So a URL
    # with any password except `***` counts as a secret.
    return re.search(r"://[^\s/@]*:(?!\*\*\*@)[^\s@]*@", text) is not None
