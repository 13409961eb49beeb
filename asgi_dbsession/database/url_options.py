"""The options in a URL, on their way to the driver."""

import json
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from typing import Any

from sqlalchemy import URL

from asgi_dbsession.errors import ConfigurationError, without_secrets

# The names of one option: libpq's, those of MySQL's clients, and those of other tools.
_SSL_MODE = ("sslmode", "ssl-mode", "ssl_mode", "sslMode", "ssl", "sslaccept")


class UrlOptions:
    """The options in a URL, and what becomes of them.

    Args:
        url: Names its driver.

    Attributes:
        query: What stays in the URL.
        arguments: What goes into `connect_args`, because it cannot be written as text.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        self.driver: str = url.get_driver_name()
        self.query: dict[str, Any] = dict(url.query)
        self.arguments: dict[str, Any] = {}

    def take(self, *names: str) -> str | None:
        """Take an option out of the URL; None, if there is none of these names."""
        found = [self.query.pop(name) for name in names if name in self.query]
        return found[0] if found and isinstance(found[0], str) else None

    def number(self, name: str, of: Callable[[str], float], to: str | None = None) -> None:
        """Have the driver get a number, where the URL has a text."""
        value = self.take(name)
        if value is not None:
            try:
                self.arguments[to or name] = of(value)
            except ValueError:
                # Outside of the error: its message quotes the value.
                self.refuse(name, "It takes a number.")

    def refuse(self, name: str, cure: str) -> None:
        """Raise what says so."""
        # A name that is none may be a part of a password that was not percent-encoded.
        shown = name if re.fullmatch(r"[A-Za-z][\w.-]{1,30}", name) else "(not shown)"
        raise ConfigurationError(
            f"The option {shown} in the URL of {without_secrets(self.url)} does not suit the "
            f"driver {self.driver}. {cure}"
        ) from None


def take_ssl_mode(options: UrlOptions, modes: Mapping[str, str]) -> str | None:
    """Take the option that says whether to encrypt, in the words of the driver."""
    value = options.take(*_SSL_MODE)
    if value is None:
        return None
    if value.startswith("{"):  # as PlanetScale writes it for Node.js
        try:
            strict = json.loads(value).get("rejectUnauthorized", True)
        except ValueError:
            strict = True
        value = "strict" if strict else "accept_invalid_certs"
    value = value.lower()
    mode = modes.get(value, value)
    if mode not in modes.values():
        options.refuse("sslmode", f"It takes one of {', '.join(sorted(set(modes.values())))}.")
    return mode


def is_on(value: str | None) -> bool:
    """Whether a value says yes."""
    return value is not None and value.lower() in ("true", "1", "yes", "on")


def known_to(module: str, function: str, *more: str) -> Callable[[], set[str]]:
    """The names of the arguments that a driver's function takes, asked for when needed."""

    def names() -> set[str]:
        connect = getattr(import_module(module), function)
        return {*signature(connect).parameters, *more}

    return names
