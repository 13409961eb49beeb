"""Checks the arguments of `DBSessionMiddleware`."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sqlalchemy import URL

from asgi_dbsession.database.arguments import check_flags, check_function, check_number
from asgi_dbsession.database.async_database import AsyncDatabase
from asgi_dbsession.database.sync_database import SyncDatabase
from asgi_dbsession.errors import ConfigurationError, kind_of
from asgi_dbsession.session.tasks import current_task
from asgi_dbsession.types import ASGIApp

from .lifespan import Unstartable
from .rules import commit_rule

AnyDatabase: TypeAlias = AsyncDatabase[Any] | SyncDatabase[Any]
# The middleware options that take a function with one parameter. For each option: the name of the
# parameter for the error text, and a sentence to add if the option is not a function.
_FUNCTIONS = {
    "on_commit_error": ("error", ""),
    "on_report": ("report", ""),
    "read_only": ("scope", " Write `read_only=safe_methods`, or leave it out."),
}
# Databases are positional arguments. If an application gives a database as a keyword argument with
# one of these names, the error text says how to write it.
_NAMES_OF_DATABASES = {"database", "databases", "db", "engine", "url"}
# The default value of the argument `app`: no application was given as the first argument.
no_application: Any = None


def application_first(
    app: Any, databases: tuple[AnyDatabase | str | URL, ...], unknown: dict[str, Any]
) -> tuple[ASGIApp, tuple[AnyDatabase | str | URL, ...]]:
    """Find the application and the databases in the arguments of `DBSessionMiddleware`.

    Litestar's `DefineMiddleware` and Starlette below 0.41.3 pass the application as the keyword
    argument `app`. Then the first positional argument is a database and not the application.

    Returns:
        A pair: (1) the application, (2) the databases.
    """
    named: Any = unknown.pop("app", None)
    if named is None:
        return app, databases
    return named, (databases if app is None else (app, *databases))


def usable_databases(
    given: Sequence[AnyDatabase | str | URL],
    unknown: Mapping[str, object],
    options: Mapping[str, Any],
) -> tuple[AnyDatabase, ...] | Unstartable:
    """Check the arguments of `DBSessionMiddleware`, and return its databases.

    If an event loop is running, a server may be starting, and would ignore an exception. So if an
    argument is wrong then, return an `Unstartable` object. This object makes the startup of the
    server, and each request, fail with the error.

    For a wrong URL, or a database without two-phase commit, never raise an exception. Return an
    `Unstartable` object even without an event loop.

    Raises:
        ConfigurationError: Another argument is wrong, and no event loop is running.
    """
    try:
        if not callable(options["app"]):
            raise ConfigurationError(
                f"DBSessionMiddleware wraps an ASGI application, not {kind_of(options['app'])}. "
                "Give it the application first."
            )
        _check_names(unknown, options)
        _check_databases(given)
        check_flags(two_phase=options["two_phase"])
        # Call `commit_rule` only because it raises an error if `commit_when` is wrong.
        commit_rule(options["commit_when"])
        for name, (parameter, cure) in _FUNCTIONS.items():
            if options[name] is not None:
                check_function(name, options[name], parameter, cure)
        check_number("attempts", options["attempts"])
        if options["retry_after"] is not None:
            check_number("retry_after", options["retry_after"])
        if options["retry_on"] is not None:
            from asgi_dbsession.retry.rule import check_retry_on

            check_retry_on(options["retry_on"], options["attempts"])
    except ConfigurationError as error:
        if current_task() is None:
            raise
        return Unstartable(error)
    try:
        databases = tuple(
            AsyncDatabase(each) if isinstance(each, str | URL) else each for each in given
        ) or (AsyncDatabase.from_env(),)
        if options["two_phase"]:
            from asgi_dbsession.unit.optional.two_phases.commit import refuse_one_phase

            refuse_one_phase(databases)
    except ConfigurationError as error:
        return Unstartable(error)
    return databases


def _check_names(unknown: Mapping[str, object], options: Mapping[str, Any]) -> None:
    if unknown:
        known = [each for each in options if each not in ("app", "databases")]
        cure = f"It takes {', '.join(known)}."
        if unknown.keys() & _NAMES_OF_DATABASES:
            cure = "Give databases without a name: `add_middleware(DBSessionMiddleware, database)`."
        raise ConfigurationError(
            f"DBSessionMiddleware takes no option {', '.join(unknown)}. {cure}"
        )


def _check_databases(given: Sequence[object]) -> None:
    for each in given:
        if not isinstance(each, AsyncDatabase | SyncDatabase | str | URL):
            from asgi_dbsession.database.optional.mistakes import cure_for

            raise ConfigurationError(
                "DBSessionMiddleware takes a URL, an AsyncDatabase or a SyncDatabase, not "
                f"{kind_of(each)}.{cure_for(each)}"
            )
    databases = [each for each in given if isinstance(each, AsyncDatabase | SyncDatabase)]
    if len(set(databases)) < len(databases):
        raise ConfigurationError(f"The same database was given twice: {databases}. Give it once.")
    replica_sets = [each._replica_set for each in databases if each._replica_set is not None]
    if replica_sets:
        from asgi_dbsession.replicas.checks import check_cookies

        check_cookies(replica_sets)
