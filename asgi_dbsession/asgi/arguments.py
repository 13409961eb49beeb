"""What `DBSessionMiddleware` can be made with, and what it says about anything else."""

from collections.abc import Mapping, Sequence
from inspect import iscoroutinefunction
from typing import Any, TypeAlias

from sqlalchemy import URL

from asgi_dbsession.database.async_database import AsyncDatabase
from asgi_dbsession.database.sync_database import SyncDatabase
from asgi_dbsession.errors import ConfigurationError

AnyDatabase: TypeAlias = AsyncDatabase[Any] | SyncDatabase[Any]


def check_arguments(
    app: object,
    databases: Sequence[object],
    *,
    functions: Mapping[str, object],
    numbers: Mapping[str, object],
) -> None:
    """Refuse what cannot work, whatever the URLs say.

    Args:
        app: The application.
        databases: Databases and URLs.
        functions: What must be a plain function, by name; None is left out.
        numbers: What must be a whole number from 1 on, by name; None is left out.

    Raises:
        ConfigurationError: An argument is not what it should be.
    """
    if not callable(app):
        raise ConfigurationError(
            "DBSessionMiddleware wraps an ASGI application, and was given something of type "
            f"{type(app).__name__}. Give it the application first."
        )
    _check_databases(databases)
    for name, function in functions.items():
        if name == "commit_when" or function is not None:
            _check_function(name, function)
    for name, number in numbers.items():
        if name == "attempts" or number is not None:
            _check_number(name, number)


def databases_of(given: Sequence[AnyDatabase | str | URL]) -> tuple[AnyDatabase, ...]:
    """The databases that are meant; none given: that of the environment.

    Raises:
        ConfigurationError: A URL, or that of the environment, cannot work.
    """
    if not given:
        return (AsyncDatabase.from_env(),)
    return tuple(AsyncDatabase(each) if isinstance(each, str | URL) else each for each in given)


def _check_databases(given: Sequence[object]) -> None:
    databases = [each for each in given if not isinstance(each, str | URL)]
    for each in databases:
        if not isinstance(each, AsyncDatabase | SyncDatabase):
            raise ConfigurationError(
                "DBSessionMiddleware takes a URL, an AsyncDatabase or a SyncDatabase, not "
                f"something of type {type(each).__name__}. Write "
                "`AsyncDatabase.from_engine(engine)` for an engine."
            )
    if len(set(databases)) < len(databases):
        raise ConfigurationError(f"The same database was given twice: {databases}.")


def _check_function(name: str, given: object) -> None:
    if not callable(given) or iscoroutinefunction(given):
        kind = "a coroutine function" if iscoroutinefunction(given) else type(given).__name__
        raise ConfigurationError(f"{name} takes a plain function, not {kind}.")


def _check_number(name: str, given: object) -> None:
    if type(given) is not int or given < 1:  # True is an int too
        raise ConfigurationError(f"{name} takes a whole number from 1 on.")
