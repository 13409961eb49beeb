"""Converts an error of a connection attempt into an error that says what to do."""

from copy import copy
from typing import Any

from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    NoSuchModuleError,
    ProgrammingError,
    TimeoutError as PoolTimeout,
)

from asgi_dbsession.errors import (
    ConfigurationError,
    DatabaseNotRunning,
    DatabaseUnavailable,
    DBSessionError,
)

from .secrets import secrets_of, tells_a_secret

# Drivers raise these errors for an option with an unknown name or a wrong value.
_REFUSED = (TypeError, ValueError, AttributeError, ArgumentError, NoSuchModuleError)
_OTHER_LOOP = ("different loop", "different event loop", "Event loop is closed")
_LOGIN = (
    "authentication",
    "access denied",
    "no password supplied",
    "no pg_hba.conf entry",
    "login failed",
)
_DRIVERS = ("asyncpg", "psycopg", "asyncmy", "aiomysql", "pymysql", "sqlite3", "aiosqlite")
_FILE_ADVICE = "Does the folder of the file exist, and may this process write to it?"
_LOGIN_ADVICE = (
    "Are user and password right? Where the application prepares them only later (tokens, "
    "secrets), write `ping_on_startup=False`, or set them in a `do_connect` listener that "
    "`on_engine` adds."
)
_POOL_ADVICE = (
    "All connections of its pool are in use: start it before they are taken, or make the pool "
    "larger (`pool_size`, `max_overflow`)."
)


def failure_of(database: Any, error: Exception) -> Exception:
    """Return an error that explains why the database did not answer, or `error` itself.

    The result is `DatabaseUnavailable` only if the driver could not connect or log in. If the
    reason is not known, the result is `error` itself.
    """
    chain = _chain(error)
    for each in chain:
        # SQLAlchemy may have wrapped an error of this package (of `testing.rolled_back()`, for
        # example). Return the error of this package, because its text says what to do.
        if isinstance(each, DBSessionError):
            return each if each is error else copy(each)
    if any(name in str(each) for each in chain for name in _OTHER_LOOP):
        return DatabaseNotRunning(database, other_loop=True)
    reason = reason_of(database, error)
    if _refuses_options(chain):
        return ConfigurationError(
            f"Connecting to {database} with these options failed: {reason}. Check the options in "
            "its URL (after `?`) and in `connect_args`, and its other arguments."
        )
    if any(map(keeps_from_connecting, chain)):
        return DatabaseUnavailable(database, reason, _advice_for(chain))
    # The error comes neither from the driver nor from this package. A listener of the application
    # may have raised it. So return it unchanged.
    return error


def _refuses_options(chain: list[BaseException]) -> bool:
    if any(isinstance(each, OSError) for each in chain):
        return False
    return isinstance(chain[0], ProgrammingError) or any(isinstance(e, _REFUSED) for e in chain)


def keeps_from_connecting(error: BaseException) -> bool:
    """Return True if the error comes from the driver or the pool, and not from the application."""
    # SQLAlchemy wraps most errors of drivers, but not those that a driver raises while it connects.
    # These are found by the name of their module.
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, DBAPIError | OSError | PoolTimeout) or module in _DRIVERS


def _advice_for(chain: list[BaseException]) -> str | None:
    if isinstance(chain[0], PoolTimeout):
        return _POOL_ADVICE
    said = " ".join(map(str, chain)).lower()
    if "unable to open database file" in said:
        return _FILE_ADVICE
    return _LOGIN_ADVICE if any(word in said for word in _LOGIN) else None


def reason_of(database: Any, error: Exception) -> str:
    """Return the message of the driver in one line, or only the error's class to hide a secret."""
    original = getattr(error, "orig", None) or error
    text = " ".join(str(original).split()) or type(original).__name__
    if tells_a_secret(text, secrets_of(database.url, database._engine_options)):
        # The driver's message contains a secret, such as the password. Return only the class of the
        # error. Do not just cut the secret out of the message: a reader could guess the secret from
        # the words around the gap.
        return f"{type(original).__name__} (the text of the driver may hold a secret)"
    return text.rstrip(".?")


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error, the driver's error inside it, and all their causes."""
    chain: list[BaseException] = []
    # Stop at an error that is already in the list. After `raise error from error`, an error is its
    # own cause, and the loop would never end.
    while error is not None and error not in chain:
        chain.append(error)
        error = getattr(error, "orig", None) or error.__cause__
    return chain
