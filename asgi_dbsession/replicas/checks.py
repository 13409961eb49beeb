"""Checks the option `replicas`, and that each given URL can be a replica of the primary."""

import re
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from asgi_dbsession.database.arguments import accepts, check_number
from asgi_dbsession.errors import ConfigurationError, kind_of

# The characters that the name and the path of a cookie may have. Source: RFC 6265, section 4.1.1
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_PATH = re.compile(r"/[^;\s\x00-\x1f\x7f]*")


def check_replicas(
    urls: object, max_lag: float, cookie: object, path: object, store: object
) -> None:
    """Check the arguments of `Replicas`.

    Raises:
        ConfigurationError: An argument is wrong.
    """
    if isinstance(urls, str | URL) or not isinstance(urls, Sequence):
        raise ConfigurationError("replicas takes a list of URLs, even of one: `replicas=[url]`.")
    check_number("max_lag", max_lag, seconds=True)
    if max_lag == inf:
        raise ConfigurationError("max_lag takes a finite number of seconds.")
    if not isinstance(cookie, str) or not _NAME.fullmatch(cookie):
        raise ConfigurationError("cookie takes the name of a cookie: letters, digits, `_` and `-`.")
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise ConfigurationError("path takes the path of a cookie, such as `/`.")
    if store is not None and not _is_store(store):
        raise ConfigurationError(
            "store takes an object, and not a class, with the methods `async def load(scope)` and "
            f"`async def save(scope, position)`, not {kind_of(store)}."
        )


def _is_store(given: Any) -> bool:
    load, save = getattr(given, "load", None), getattr(given, "save", None)
    if not callable(load) or not callable(save):
        return False
    return accepts(load, "scope") and accepts(save, "scope", "position")


def check_cookies(replica_sets: Sequence[Any]) -> None:
    """Raise an error if two databases with replicas have the same cookie.

    For each database, a cookie stores the WAL position up to which the client has seen its data.

    Args:
        replica_sets: The `ReplicaSet` objects of all databases that have replicas.

    Raises:
        ConfigurationError: Two databases have the same cookie.
    """
    cookies = [each.options.cookie for each in replica_sets if each.options.store is None]
    if len(set(cookies)) < len(cookies):
        raise ConfigurationError(
            f"Several databases with replicas have the same cookie: {', '.join(cookies)}. Write "
            '`replicas=Replicas(urls, cookie="...")` for one of them.'
        )


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
            f"{database} has `binds` in session_options. Those engines have no replicas. Use a "
            "database of its own for each of the other engines."
        )


def with_driver(url: str | URL, database: Any) -> str | URL:
    """Return the URL of a server. If the URL names no driver, add the driver of the primary."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError, AttributeError):
        return url  # The URL is not valid: `AsyncDatabase` or `SyncDatabase` will raise an error.
    if parsed.drivername in ("postgres", "postgresql"):
        return parsed.set(drivername=database.url.drivername)
    return parsed


def check_replica(replica: Any, database: Any, others: Sequence[Any]) -> None:
    """Raise an error if `replica` cannot be a replica of the primary `database`.

    Raises:
        ConfigurationError: The replica has another driver than the primary. Or the replica has the
            same URL as the primary or as another replica.
    """
    if replica.url.drivername != database.url.drivername:
        raise ConfigurationError(
            f"{replica} has another driver than its primary, {database}. Leave the driver out, or "
            "write the same driver in both URLs."
        )
    if any(replica.url == each.url for each in (database, *others)):
        raise ConfigurationError(
            f"{replica} was given twice. Give `replicas` the URL of each replica once, and not "
            "that of the primary."
        )
