"""What `DBSessionMiddleware` can be made with, and what it says of anything else."""

from collections.abc import Sequence
from inspect import iscoroutinefunction
from typing import Any, TypeAlias

from sqlalchemy import URL

from asgi_dbsession.database.async_database import AsyncDatabase
from asgi_dbsession.database.sync_database import SyncDatabase
from asgi_dbsession.errors import ConfigurationError

AnyDatabase: TypeAlias = AsyncDatabase[Any] | SyncDatabase[Any]


def databases_of(given: Sequence[AnyDatabase | str | URL]) -> tuple[AnyDatabase, ...]:
    """The databases that are meant; none given: that of the environment.

    Raises:
        ConfigurationError: A URL, or that of the environment, cannot work.
    """
    if not given:
        return (AsyncDatabase.from_env(),)
    return tuple(AsyncDatabase(each) if isinstance(each, str | URL) else each for each in given)


def check_databases(given: Sequence[object]) -> None:
    """Refuse what is neither a database nor a URL, and the same database twice."""
    databases = [each for each in given if not isinstance(each, str | URL)]
    for each in databases:
        if not isinstance(each, AsyncDatabase | SyncDatabase):
            raise ConfigurationError(
                "DBSessionMiddleware takes a URL, an AsyncDatabase or a SyncDatabase, not "
                f"something of type {type(each).__name__}; an engine goes into "
                "`AsyncDatabase.from_engine(engine)`."
            )
    if len(set(databases)) < len(databases):
        raise ConfigurationError(f"The same database was given twice: {databases}.")


def check_application(app: object) -> None:
    """Refuse what cannot be called."""
    if not callable(app):
        raise ConfigurationError(
            "DBSessionMiddleware is put around an ASGI application, and this is something of "
            f"type {type(app).__name__}: give it the application first."
        )


def check_function(name: str, given: object) -> None:
    """Refuse what cannot be called, or would have to be awaited."""
    if not callable(given) or iscoroutinefunction(given):
        raise ConfigurationError(f"{name} takes a plain function, not {given!r}.")


def check_number(name: str, given: object) -> None:
    """Refuse what is no whole number from 1 on; True is an int too."""
    if type(given) is not int or given < 1:
        raise ConfigurationError(f"{name} takes a whole number from 1 on, not {given!r}.")
