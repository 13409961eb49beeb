"""Reads the options in a database URL, to translate the options for the driver."""

import json
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from typing import Any

from sqlalchemy import URL

from asgi_dbsession.errors import ConfigurationError, without_secrets

# All names of the TLS option in libpq, in MySQL's clients and in other tools.
_SSL_MODE = ("sslmode", "ssl-mode", "ssl_mode", "sslMode", "ssl", "sslaccept")


class UrlOptions:
    """The options in a URL: some stay in the URL, others become `connect_args`.

    Args:
        url: A URL with a driver.

    Attributes:
        query: The options that stay in the URL.
        arguments: The options for `connect_args`, because their values are not text.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        self.driver: str = url.get_driver_name()
        self.query: dict[str, Any] = dict(url.query)
        self.arguments: dict[str, Any] = {}

    def take(self, *names: str) -> str | None:
        """Remove an option from the URL, and return its value; None if the URL lacks the option."""
        found = [self.query.pop(name) for name in names if name in self.query]
        return found[0] if found and isinstance(found[0], str) else None

    def number(self, name: str, of: Callable[[str], float], to: str | None = None) -> None:
        """Move an option to `connect_args` as a number, because the driver accepts no text."""
        value = self.take(name)
        if value is not None:
            try:
                self.arguments[to or name] = of(value)
            except ValueError:
                # `refuse` does not show the ValueError, because its message contains the value.
                self.refuse(name, "It takes a number.")

    def refuse(self, name: str, cure: str) -> None:
        """Raise a ConfigurationError that names the option, and says what to write instead."""
        # Do not show an unusual name, which may be a part of a password that is not
        # percent-encoded.
        shown = name if re.fullmatch(r"[A-Za-z][\w.-]{1,30}", name) else "(not shown)"
        raise ConfigurationError(
            f"The option {shown} in the URL of {without_secrets(self.url)} does not suit the "
            f"driver {self.driver}. {cure}"
        ) from None


def take_ssl_mode(options: UrlOptions, modes: Mapping[str, str]) -> str | None:
    """Remove the TLS option from the URL, and return the driver's word for its value."""
    value = options.take(*_SSL_MODE)
    if value is None:
        return None
    # PlanetScale's URLs contain the TLS option as JSON, for its driver for Node.js.
    if value.startswith("{"):
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
    """Return True if the value of an option means yes, such as `true` or `1`."""
    return value is not None and value.lower() in ("true", "1", "yes", "on")


def known_to(module: str, function: str, *more: str) -> Callable[[], set[str]]:
    """Return a function that lists the option names of a driver: the arguments of `function`."""

    def names() -> set[str]:
        connect = getattr(import_module(module), function)
        return {*signature(connect).parameters, *more}

    return names
