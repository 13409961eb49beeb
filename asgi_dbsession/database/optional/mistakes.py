"""Explains mistakes in the arguments of `AsyncDatabase` and `SyncDatabase`."""

import re
from collections.abc import Iterable, Mapping

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_dbsession.errors import ConfigurationError


def not_a_url(given: object) -> ConfigurationError:
    """Return the error for a value that is not a database URL."""
    if isinstance(given, Engine | AsyncEngine):
        return ConfigurationError(f"This is an engine, not a database URL.{cure_for(given)}")
    subject = "None" if given is None else "This"
    return ConfigurationError(
        f"{subject} is not a database URL. Write `dialect://user:password@host:port/name`, for "
        "example `postgresql://app@localhost/shop` or `sqlite:///shop.db`, without quotes, "
        "and with special characters percent-encoded (`sqlalchemy.URL.create` does it)."
    )


def cure_for(given: object) -> str:
    """Return a sentence that says how to use an engine, or "" if `given` is not an engine."""
    if not isinstance(given, Engine | AsyncEngine):
        return ""
    kind = "SyncDatabase" if isinstance(given, Engine) else "AsyncDatabase"
    return f" Write `{kind}.from_engine(engine)`."


def no_variable(name: str, kind: str) -> ConfigurationError:
    """Return the error for an environment variable that is not set.

    Args:
        name: The name that `from_env` was given.
        kind: The name of the class whose `from_env` was called.
    """
    # The application may have given a URL, with a password, instead of a name. So show the name
    # only if it looks like the name of an environment variable.
    if "://" in name:
        return ConfigurationError(
            "from_env takes the name of an environment variable, and this is a URL. Write "
            f"`{kind}(url)`."
        )
    is_name = re.fullmatch(r"[A-Z][A-Z0-9_]*", name)
    return ConfigurationError(
        f"{name if is_name else 'The variable'} is not set. Set it to a database URL, for example "
        f"`{name if is_name else 'DATABASE_URL'}=sqlite:///shop.db`, or give {kind} the URL itself."
    )


def options_of_the_session(names: Iterable[str], given: Mapping[str, object]) -> ConfigurationError:
    """Return the error for options of the session that were given as options of the engine.

    Args:
        names: The names of these options.
        given: All options and their values. Only True and False are shown, because other values
            may be secrets.
    """
    values = {name: given[name] if isinstance(given[name], bool) else "…" for name in sorted(names)}
    shown = ", ".join(f'"{name}": {value}' for name, value in values.items())
    return ConfigurationError(
        f"The engine takes no option {', '.join(values)}, but the session does. Write "
        f"`session_options={{{shown}}}`."
    )


def no_option_of_from_engine(
    names: Iterable[str], kind: str, *, is_async: bool
) -> ConfigurationError:
    """Return the error for options that `from_engine` does not take.

    Args:
        names: The names of these options.
        kind: The name of the class whose `from_engine` was called.
        is_async: True if this class needs an `AsyncEngine`.
    """
    shown = ", ".join(names)
    create = "create_async_engine" if is_async else "create_engine"
    return ConfigurationError(
        f"from_engine takes session_options and ping_on_startup, not {shown}. Set options of the "
        f"engine in `{create}`, or write `{kind}(url, {shown.replace(',', '=…,')}=…)`."
    )
