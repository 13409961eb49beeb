"""Checks that a database can have replicas, and that each replica fits to its primary."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from asgi_dbsession.errors import ConfigurationError


def check_primary(database: Any, options: Mapping[str, Any]) -> None:
    """Raise an error if a database cannot have replicas.

    Raises:
        ConfigurationError: The database is not PostgreSQL, its isolation level is SERIALIZABLE, or
            its `session_options` have `binds`.
    """
    if database.url.get_backend_name() != "postgresql":
        raise ConfigurationError(
            f"{database} cannot have replicas: their positions are known for PostgreSQL only. "
            "Leave out `replicas`, or give the URL of a PostgreSQL."
        )
    if options.get("isolation_level") == "SERIALIZABLE":
        raise ConfigurationError(
            f"{database} cannot have replicas, because replicas refuse SERIALIZABLE. Leave out "
            '`isolation_level`, or write "REPEATABLE READ".'
        )
    if database._session_options.get("binds"):
        raise ConfigurationError(
            f"{database} has `binds` in session_options, which would pass by its replicas. Use a "
            "database of its own for each of the other engines."
        )


def with_driver(url: str | URL, database: Any) -> str | URL:
    """Return the URL of a replica. If it names no driver, add the driver of the primary."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError, AttributeError):
        return url  # `AsyncDatabase` or `SyncDatabase` will raise an error for this URL.
    if parsed.drivername in ("postgres", "postgresql"):
        return parsed.set(drivername=database.url.drivername)
    return parsed


def check_replica(replica: Any, database: Any, others: Sequence[Any]) -> None:
    """Raise an error if `replica` cannot be a replica of the primary `database`.

    Raises:
        ConfigurationError: The replica has another driver than the primary. Or it has the same URL
            as the primary or as another replica.
    """
    if replica.url.drivername != database.url.drivername:
        raise ConfigurationError(
            f"{replica} is to be a replica of {database}, and has another driver. Leave the driver "
            "out, or write the same one."
        )
    if any(replica.url == each.url for each in (database, *others)):
        raise ConfigurationError(
            f"{replica} was given twice. Give `replicas` the URL of each replica once, and not "
            "that of the primary."
        )
