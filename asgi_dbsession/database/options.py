"""Checks the options `session_options` and `autocommit_reads` of a database.

The types of `session_options` are defined here too.
"""

from collections.abc import Mapping
from typing import Any, Generic

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Query, Session
from typing_extensions import TypedDict, TypeVar

from asgi_dbsession.errors import ConfigurationError, kind_of
from asgi_dbsession.session.reads import DRIVERS, ON_DEMAND, Reads

AnyAsyncSession = TypeVar("AnyAsyncSession", bound=AsyncSession, default=AsyncSession)
AnySession = TypeVar("AnySession", bound=Session, default=Session)


class _Options(TypedDict, total=False):
    autobegin: bool
    autoflush: bool
    binds: dict[Any, Any]
    enable_baked_queries: bool
    execution_options: dict[str, Any]
    expire_on_commit: bool
    info: dict[Any, Any]
    join_transaction_mode: Any
    query_cls: type[Query[Any]]
    twophase: bool


class SessionOptions(_Options, Generic[AnySession], total=False):
    """The options of `sqlalchemy.orm.Session`; `class_` is the session class to use.

    Source: https://docs.sqlalchemy.org/en/20/orm/session_api.html#sqlalchemy.orm.Session
    """

    class_: type[AnySession]


class AsyncSessionOptions(_Options, Generic[AnyAsyncSession], total=False):
    """The options of `sqlalchemy.ext.asyncio.AsyncSession`; `class_` is the session class to use.

    This package commits the `Session` inside the `AsyncSession`. It never calls the method
    `AsyncSession.commit`. So to change what happens at COMMIT, use `sync_session_class` or
    SQLAlchemy's events. Source:
    https://docs.sqlalchemy.org/en/20/orm/extensions/asyncio.html#sqlalchemy.ext.asyncio.AsyncSession
    """

    class_: type[AnyAsyncSession]
    sync_session_class: type[Session]


# The options of a session that are refused as options of an engine. `execution_options` is not
# refused, because an engine has this option too.
_SESSION_ONLY = AsyncSessionOptions.__optional_keys__ - {"execution_options"}


def checked_options(
    given: Mapping[str, Any] | None, engine_options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the `session_options` of a database, with the defaults of this package added.

    Args:
        given: The `session_options` that the application has given. None if it has given none.
        engine_options: The options of the engine.

    Raises:
        ConfigurationError: `given` is not a dictionary, or an option of the session is among the
            options of the engine.
    """
    if misplaced := engine_options.keys() & _SESSION_ONLY:
        from .optional.mistakes import options_of_the_session

        raise options_of_the_session(misplaced, engine_options)
    if given is not None and not isinstance(given, Mapping):
        raise ConfigurationError(f"session_options takes a dictionary, not {kind_of(given)}.")
    return {
        "expire_on_commit": False,
        **(given or {}),
        # A closed session must not be used again. A task could use the session after its request,
        # and nobody would return the session's connection to the pool.
        "close_resets_only": False,
    }


def take_class(options: dict[str, Any], option: str, base: type) -> Any:
    """Remove a session class from the options, and return it. It must be a subclass of `base`."""
    session_class = options.pop(option, base)
    if isinstance(session_class, type) and issubclass(session_class, base):
        return session_class
    raise ConfigurationError(
        f'session_options["{option}"] takes a subclass of {base.__name__}, not '
        f"{kind_of(session_class)}."
    )


def reads_of(database: object, wanted: object, driver: str) -> Reads:
    """Return the object that decides if the sessions of a database read without BEGIN and COMMIT.

    Args:
        database: The database. An error shows its name.
        wanted: The value that the application has given for the option `autocommit_reads`.
        driver: The name of the database driver, for example "asyncpg".

    Raises:
        ConfigurationError: The value is not True, False or None, or it is True and sessions cannot
            read without a transaction with this driver.
    """
    if wanted is not None and not isinstance(wanted, bool):
        raise ConfigurationError("autocommit_reads takes True, False or None.")
    if driver in DRIVERS:
        from asgi_dbsession.session.optional.reads.delayed import DelayingReads

        return DelayingReads(wanted)
    if wanted and driver in ON_DEMAND:
        from asgi_dbsession.session.optional.reads.mariadb import AutocommitReads

        return AutocommitReads()
    if wanted:
        raise ConfigurationError(
            f"{database} cannot read without a transaction. Leave out `autocommit_reads=True`, or "
            f"use {', '.join(DRIVERS)} (PostgreSQL), {', '.join(ON_DEMAND)} (MariaDB, MySQL)."
        )
    return Reads()
