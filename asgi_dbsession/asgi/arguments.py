"""What `DBSessionMiddleware` can be made with, and what it says of anything else."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter, iscoroutinefunction, signature
from typing import Any, TypeAlias, TypeVar

from anyio import get_current_task
from sqlalchemy import URL

from asgi_dbsession.database.async_database import AsyncDatabase
from asgi_dbsession.database.sync_database import SyncDatabase
from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.types import ASGIApp, Receive, Scope, Send

D = TypeVar("D")

AnyDatabase: TypeAlias = AsyncDatabase[Any] | SyncDatabase[Any]


async def no_application(scope: Scope, receive: Receive, send: Send) -> None:
    """Stand for an application that was not given; it is never called."""


def application_first(
    app: ASGIApp, databases: tuple[D, ...], unknown: Mapping[str, object]
) -> tuple[ASGIApp, tuple[D, ...]]:
    """The application and the databases, whether the application came by position or by name.

    Litestar's `DefineMiddleware` and Starlette below 0.41.3 give the application by name, so the
    first database stands in its place.
    """
    named: Any = unknown.get("app")
    if named is None:
        return app, databases
    first: Any = app
    return named, (databases if first is no_application else (first, *databases))


def in_event_loop() -> bool:
    """Whether the caller runs in an event loop, such as that of a server."""
    try:
        get_current_task()
    except RuntimeError:
        return False
    return True


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
    """Refuse what cannot be called, and nothing at all."""
    if app is no_application:
        raise ConfigurationError(
            "DBSessionMiddleware is put around an ASGI application: give it the application first."
        )
    if not callable(app):
        raise ConfigurationError(
            "DBSessionMiddleware is put around an ASGI application, and this is something of "
            f"type {type(app).__name__}: give it the application first."
        )


def check_names(unknown: Mapping[str, object], function: Callable[..., object]) -> None:
    """Refuse options that `function` does not have: Python's own error would be lost in a server.

    Frameworks make their middleware within the lifespan, and servers take any error there for an
    application without a lifespan.
    """
    parameters = signature(function).parameters.values()
    known = [each.name for each in parameters if each.kind is Parameter.KEYWORD_ONLY]
    for name in unknown:
        if name != "app":
            close = get_close_matches(name, known, 1)
            cure = f"Did you mean {close[0]}?" if close else f"It takes {', '.join(known)}."
            raise ConfigurationError(f"DBSessionMiddleware takes no option {name}. {cure}")


def check_function(name: str, given: object) -> None:
    """Refuse what cannot be called, or would have to be awaited."""
    if iscoroutinefunction(given):
        raise ConfigurationError(
            f"{name} takes a plain function, and this one is a coroutine function: write it with "
            "`def`, not `async def`."
        )
    if not callable(given):
        raise ConfigurationError(
            f"{name} takes a plain function, not something of type {type(given).__name__}."
        )


def check_number(name: str, given: object) -> None:
    """Refuse what is no whole number from 1 on; True is an int too."""
    if type(given) is not int:
        # Not quoted: a value in the wrong place may be a secret.
        raise ConfigurationError(
            f"{name} takes a whole number from 1 on, not something of type {type(given).__name__}."
        )
    if given < 1:
        raise ConfigurationError(f"{name} takes a whole number from 1 on, not {given}.")
