"""What it means that a database did not answer, and what to do about it."""

from collections.abc import Iterator
from copy import copy

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

from .secrets import tells_a_secret

# What drivers raise at arguments that they do not have, or cannot read.
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
_ADVICE = "Is it running, and are host, port, name and credentials right?"
_LOGIN_ADVICE = (
    "Are user and password right? Where the application prepares them only later (tokens, "
    "secrets), write `ping_on_startup=False`, or set them in a `do_connect` listener on an engine "
    "that is given to `from_engine`."
)
_POOL_ADVICE = (
    "All connections of its pool are in use: start it before they are taken, or make the pool "
    "larger (`pool_size`, `max_overflow`)."
)


def failure_of(database: object, error: Exception, secrets: set[str]) -> Exception:
    """The error that says what a failed ping means; `error` itself, if it says nothing of this.

    Only what keeps a driver from connecting or logging in is `DatabaseUnavailable`.
    """
    chain = list(_chain(error))
    for each in chain:
        if isinstance(each, DBSessionError):  # such as of `rolled_back`, perhaps wrapped
            return each if each is error else copy(each)
    if any(name in str(each) for each in chain for name in _OTHER_LOOP):
        return DatabaseNotRunning(database, other_loop=True)
    reason = reason_of(error, secrets)
    if _refuses_options(chain):
        return ConfigurationError(
            f"{database} cannot be connected to with these options: {reason}. Check the options in "
            "its URL (after `?`) and in `connect_args`."
        )
    if any(map(_keeps_from_connecting, chain)):
        return DatabaseUnavailable(database, reason, _advice_for(chain))
    return error  # an error of the application, in a listener for example


def _refuses_options(chain: list[BaseException]) -> bool:
    if any(isinstance(each, OSError) for each in chain):
        return False
    return isinstance(chain[0], ProgrammingError) or any(isinstance(e, _REFUSED) for e in chain)


def _keeps_from_connecting(error: BaseException) -> bool:
    # Some drivers raise errors that SQLAlchemy does not wrap while they connect.
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, DBAPIError | OSError | PoolTimeout) or module in _DRIVERS


def _advice_for(chain: list[BaseException]) -> str:
    if isinstance(chain[0], PoolTimeout):
        return _POOL_ADVICE
    said = " ".join(map(str, chain)).lower()
    return _LOGIN_ADVICE if any(word in said for word in _LOGIN) else _ADVICE


def reason_of(error: Exception, secrets: set[str]) -> str:
    """What the driver said, in one line; its class alone, if it says a secret."""
    original = getattr(error, "orig", None) or error
    text = " ".join(str(original).split()) or type(original).__name__
    if tells_a_secret(text, secrets):
        # The whole text is left out: text around a masked secret could tell the secret.
        return f"{type(original).__name__} (the text of the driver may hold a secret)"
    return text.rstrip(".")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what the driver raised, and its causes; also where they end in a circle."""
    seen: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is not None and not any(each is other for other in seen):
            seen.append(each)
            yield each
            left += [each.__cause__, getattr(each, "orig", None)]
