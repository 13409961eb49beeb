"""Reads the options in a database URL, so that they can be translated for the driver."""

import json
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from typing import Any

from sqlalchemy import URL

from asgi_dbsession.errors import ConfigurationError, without_secrets

# The names of the option that switches TLS on. Drivers, database clients and hosting providers have
# different names for it.
_SSL_MODE = ("sslmode", "ssl-mode", "ssl_mode", "sslMode", "ssl", "sslaccept")
# Values of TLS options in a database URL, such as `ssl=true`. For each value: the value of the
# option `sslmode` that means the same.
_SYNONYMS = {
    "0": "disable",
    "1": "require",
    "accept_invalid_certs": "require",
    "disabled": "disable",
    "false": "disable",
    "preferred": "prefer",
    "required": "require",
    "strict": "verify-full",
    "true": "require",
    "verify_ca": "verify-ca",
    "verify_full": "verify-full",
    "verify_identity": "verify-full",
}


class UrlOptions:
    """The options in a database URL. Some stay in the URL, others are moved to `connect_args`.

    Args:
        url: A URL that names its driver.

    Attributes:
        query: The options that stay in the URL.
        arguments: The options to move to `connect_args`, because the driver needs values that are
            not text.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        self.driver: str = url.get_driver_name()
        self.query: dict[str, Any] = dict(url.query)
        self.arguments: dict[str, Any] = {}

    def take(self, *names: str) -> str | None:
        """Remove an option with one of these names from the URL, and return its value or None."""
        found = [self.query.pop(name) for name in names if name in self.query]
        return found[0] if found and isinstance(found[0], str) else None

    def number(self, name: str, of: Callable[[str], float], to: str | None = None) -> None:
        """Move an option from the URL to `connect_args`, under the name `to`, as a number."""
        value = self.take(name)
        if value is not None:
            try:
                self.arguments[to or name] = of(value)
            except ValueError:
                # `refuse` raises a ConfigurationError that hides the ValueError. The message of the
                # ValueError contains the value of the option, which may be a secret.
                self.refuse(name, "The value must be a number.")

    def refuse(self, name: str, cure: str) -> None:
        """Raise the error for an option in the database URL that the driver does not accept.

        Args:
            name: The name of the option.
            cure: A sentence for the error message, which says what to write instead.

        Raises:
            ConfigurationError: Always.
        """
        # If `@` and `?` in a password are not percent-encoded, a part of the password is read as an
        # option's name. So hide unusual names.
        shown = name if re.fullmatch(r"[A-Za-z][\w.-]{1,30}", name) else "(not shown)"
        raise ConfigurationError(
            f"The driver {self.driver} does not accept the option {shown} in the URL of "
            f"{without_secrets(self.url)}. {cure}"
        ) from None


def take_ssl_mode(options: UrlOptions, modes: Sequence[str]) -> str | None:
    """Remove the TLS option from the URL, and return its value as in PostgreSQL's `sslmode`.

    For example, MySQL's value `VERIFY_IDENTITY` becomes `verify-full`. None if the URL has no TLS
    option.

    Args:
        options: The options in the URL.
        modes: The values that the driver supports. For any other value, an error is raised.
    """
    value = options.take(*_SSL_MODE)
    if value is None:
        return None
    # In the URLs of the provider PlanetScale, the value of the TLS option is JSON for Node.js.
    # Python drivers do not understand this JSON. So find out if it requires a valid certificate.
    if value.startswith("{"):
        try:
            strict = json.loads(value).get("rejectUnauthorized", True)
        except ValueError:
            strict = True
        value = "strict" if strict else "accept_invalid_certs"
    mode = _SYNONYMS.get(value.lower(), value.lower())
    if mode not in modes:
        options.refuse("sslmode", f"The value must be one of {', '.join(modes)}.")
    return mode


def is_on(value: str | None) -> bool:
    """Return True if the value of an option means yes, such as `true` or `1`."""
    return value is not None and value.lower() in ("true", "1", "yes", "on")


def known_to(module: str, function: str, *more: str) -> Callable[[], set[str]]:
    """Return a function that lists the names of the connection options that a driver accepts.

    Args:
        module: The name of a module of the driver.
        function: The driver's function that connects. Its parameters are the options.
        *more: The names of further options, which SQLAlchemy itself handles.
    """

    def names() -> set[str]:
        connect = getattr(import_module(module), function)
        return {*signature(connect).parameters, *more}

    return names
