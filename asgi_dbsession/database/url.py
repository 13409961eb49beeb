"""Reads database URLs, and chooses a driver if a URL names none."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from asgi_dbsession.errors import ConfigurationError, without_secrets

# For each database, the async drivers and the sync drivers. If a URL names no driver, the first one
# that is installed is used.
_DRIVERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "postgresql": (("asyncpg", "psycopg"), ("psycopg", "psycopg2", "pg8000")),
    "mysql": (("asyncmy", "aiomysql"), ("mysqldb", "pymysql", "mariadbconnector")),
    "mariadb": (("asyncmy", "aiomysql"), ("mysqldb", "pymysql", "mariadbconnector")),
    "sqlite": (("aiosqlite",), ("pysqlite",)),
    "oracle": (("oracledb",), ("oracledb",)),
    "mssql": (("aioodbc",), ("pyodbc", "pymssql")),
}
# Most drivers have the same name as their PyPI package. `_PACKAGES` has the other names.
_PACKAGES: dict[str, str] = {"mysqldb": "mysqlclient", "mariadbconnector": "mariadb"}


def url_with_driver(url: str | URL, *, asynchronous: bool) -> URL:
    """Parse a database URL, and check that its driver is installed and is sync or async as needed.

    Args:
        url: A URL as in https://docs.sqlalchemy.org/en/20/core/engines.html#database-urls;
            `postgres://` means `postgresql://`. If it names no driver, an installed driver is used.
        asynchronous: True if the driver must support asyncio.

    Raises:
        ConfigurationError: The text is not a URL, the database is unknown, the driver is not
            installed, or the driver is of the wrong kind (sync or async).
    """
    parsed = _parse(url)
    if parsed.drivername == "postgres":
        parsed = parsed.set(drivername="postgresql")
    if "+" not in parsed.drivername:
        parsed = parsed.set(drivername=_choose_driver(parsed, asynchronous=asynchronous))
    _check_driver(parsed, asynchronous=asynchronous)
    return parsed


def refuse_autocommit(options: Any) -> None:
    """Raise an error if options of the driver would store each statement at once.

    Raises:
        ConfigurationError: The URL or `connect_args` has the driver's option `autocommit`.
    """
    autocommit = options.get("autocommit") if isinstance(options, Mapping) else None
    if str(autocommit).lower() in ("true", "yes", "on", "1"):
        raise ConfigurationError(
            "The driver's `autocommit` stores each statement at once, and a rollback takes "
            "nothing back. Leave `autocommit` out of the URL and of `connect_args`, or write "
            '`isolation_level="AUTOCOMMIT"` after the URL.'
        )


def is_in_memory(url: URL) -> bool:
    """Return True if the URL is for an SQLite database in memory."""
    if url.get_backend_name() != "sqlite":
        return False
    name = url.database or ":memory:"
    return ":memory:" in name or url.query.get("mode") == "memory" or "mode=memory" in name


def _parse(url: str | URL) -> URL:
    # If the URL was read from a file, there is often a line break at its end. Remove it.
    text = url.strip() if isinstance(url, str) else ""
    try:
        parsed = make_url(text or url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or not text.isprintable() or _is_misread(parsed, text):
        # Raise this error outside of the `except` block. Otherwise the traceback would also show
        # SQLAlchemy's message, which may contain the password.
        from .optional.mistakes import not_a_url

        raise not_a_url(url)
    return parsed


def _is_misread(url: URL, text: str) -> bool:
    # A password with `@` must be percent-encoded. If it is not, SQLAlchemy takes the part after `@`
    # for the name of the host. An `@` in the user name is harmless.
    secret_and_rest = text.partition("://")[2].partition(":")[2]
    return "@" in (url.host or "") or (url.password is not None and secret_and_rest.count("@") > 1)


def _choose_driver(url: URL, *, asynchronous: bool) -> str:
    of_async, of_sync = _DRIVERS.get(url.drivername, ((), ()))
    drivers = of_async if asynchronous else of_sync
    for driver in drivers:
        name = f"{url.drivername}+{driver}"
        with suppress(ImportError):
            url.set(drivername=name).get_dialect().import_dbapi()
            return name
    if not drivers:
        # The lists of drivers do not have this database, so its SQLAlchemy dialect is from another
        # package. Do not add a driver to the URL, because the dialect chooses a driver itself.
        return url.drivername
    kind = "asyncio" if asynchronous else "blocking"
    installs = " or ".join(map(_install, drivers))
    raise ConfigurationError(f"No {kind} driver for {url.drivername} is installed: {installs}.")


def _check_driver(url: URL, *, asynchronous: bool) -> None:
    shown = without_secrets(url)
    try:
        dialect = url.get_dialect()
    # SQLAlchemy raises NoSuchModuleError if it does not know the dialect or the driver, and
    # ValueError for a URL such as `postgresql+a+b://`.
    except (NoSuchModuleError, ValueError):
        raise ConfigurationError(
            f"SQLAlchemy knows no dialect and driver for {shown}. Check the part before `://`; "
            "a database that is not built in needs its dialect's package installed."
        ) from None
    if asynchronous:
        dialect = dialect.get_async_dialect_cls(url)
    if dialect.is_async != asynchronous:
        of_async, _ = _DRIVERS.get(url.get_backend_name(), (("another driver",), ()))
        raise ConfigurationError(
            f"The driver of {shown} blocks, and AsyncDatabase needs one for asyncio. "
            f"Use {' or '.join(of_async)}, or a SyncDatabase."
            if asynchronous
            else f"The driver of {shown} is for asyncio, and SyncDatabase needs one that blocks. "
            "Leave the driver out, or use an AsyncDatabase."
        )
    try:
        dialect.import_dbapi()
    except ImportError as error:
        raise ConfigurationError(
            f"The driver of {shown} is not installed: {_install(url.get_driver_name())}."
        ) from error


def _install(driver: str) -> str:
    return f"`pip install {_PACKAGES.get(driver, driver)}`"
