"""Which driver serves a database URL."""

from importlib.util import find_spec
from typing import Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

from asgi_dbsession.errors import ConfigurationError, without_secrets

# For a URL that names no driver: the first of these that is installed.
_ASYNC_DRIVERS: dict[str, tuple[str, ...]] = {
    "postgresql": ("asyncpg", "psycopg"),
    "mysql": ("asyncmy", "aiomysql"),
    "mariadb": ("asyncmy", "aiomysql"),
    "sqlite": ("aiosqlite",),
    "oracle": ("oracledb",),
    "mssql": ("aioodbc",),
}
_SYNC_DRIVERS: dict[str, tuple[str, ...]] = {
    "postgresql": ("psycopg", "psycopg2", "pg8000"),
    "mysql": ("mysqldb", "pymysql", "mariadbconnector"),
    "mariadb": ("mysqldb", "pymysql", "mariadbconnector"),
    "sqlite": ("pysqlite",),
    "oracle": ("oracledb",),
    "mssql": ("pyodbc", "pymssql"),
}
# Where the module, or the name on PyPI, is not the name of the driver.
_MODULES: dict[str, str] = {
    "mysqldb": "MySQLdb",
    "mariadbconnector": "mariadb",
    "pysqlite": "sqlite3",
}
_PACKAGES: dict[str, str] = {"mysqldb": "mysqlclient", "mariadbconnector": "mariadb"}


def url_with_driver(url: str | URL, *, asynchronous: bool) -> URL:
    """Read a database URL and make sure that its driver is there and of the right kind.

    Args:
        url: As in https://docs.sqlalchemy.org/en/20/core/engines.html#database-urls; `postgres://`
            is read as `postgresql://`. Without a driver it gets an installed one.
        asynchronous: Whether the driver must be for asyncio.

    Raises:
        ConfigurationError: Not a URL, an unknown database, or no such driver.
    """
    parsed = _parse(url)
    if parsed.drivername == "postgres":
        parsed = parsed.set(drivername="postgresql")
    if "+" not in parsed.drivername:
        parsed = parsed.set(drivername=_choose_driver(parsed, asynchronous=asynchronous))
    _check_driver(parsed, asynchronous=asynchronous)
    return parsed


def options_for_memory(url: URL, given: dict[str, Any]) -> dict[str, Any]:
    """Engine options that make an SQLite database in memory safe; those given, for any other.

    SQLAlchemy lets all sessions share its one connection, and so one transaction: whoever rolls
    back would undo what others were told is stored. Here they have it one after the other.
    Source: https://docs.sqlalchemy.org/en/20/dialects/sqlite.html#pooling-behavior
    """
    if not is_in_memory(url):
        return given
    asynchronous = url.get_dialect().is_async
    options = dict(given)
    arguments = given.get("connect_args", {})
    if not asynchronous and isinstance(arguments, dict):
        # COMMIT comes from another thread than the statements, though never at the same time.
        options["connect_args"] = {"check_same_thread": False} | arguments
    if "poolclass" not in given and "pool" not in given:
        options["poolclass"] = AsyncAdaptedQueuePool if asynchronous else QueuePool
        options |= {"pool_size": 1, "max_overflow": 0}
    return options


def is_in_memory(url: URL) -> bool:
    """Whether it is an SQLite database that is gone with its process."""
    if url.get_backend_name() != "sqlite":
        return False
    name = url.database or ":memory:"
    return ":memory:" in name or url.query.get("mode") == "memory" or "mode=memory" in name


def _parse(url: str | URL) -> URL:
    text = url.strip() if isinstance(url, str) else ""  # files of secrets end with a line break
    try:
        parsed = make_url(text or url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or not text.isprintable() or _is_misread(parsed, text):
        # Outside of the `except`: SQLAlchemy's message may quote the text, and so a password.
        subject = "None" if url is None else "This"
        raise ConfigurationError(
            f"{subject} is not a database URL. Write `dialect://user:password@host:port/name`, for "
            "example `postgresql://app@localhost/shop` or `sqlite:///shop.db`, without quotes, "
            "and with special characters percent-encoded (`sqlalchemy.URL.create` does it)."
        )
    return parsed


def _is_misread(url: URL, text: str) -> bool:
    # A second `@` belongs to a password that was not percent-encoded, and whose rest was taken for
    # a host or a name. One in the user's name does no harm.
    secret_and_rest = text.partition("://")[2].partition(":")[2]
    return "@" in (url.host or "") or (url.password is not None and secret_and_rest.count("@") > 1)


def _choose_driver(url: URL, *, asynchronous: bool) -> str:
    known = _ASYNC_DRIVERS if asynchronous else _SYNC_DRIVERS
    drivers: tuple[str, ...] = known.get(url.drivername, ())
    for driver in drivers:
        if find_spec(_MODULES.get(driver, driver)) is not None:
            return f"{url.drivername}+{driver}"
    if not drivers:
        return url.drivername  # a dialect from elsewhere: it knows its own default
    kind = "asyncio" if asynchronous else "blocking"
    installs = " or ".join(map(_install, drivers))
    raise ConfigurationError(f"No {kind} driver for {url.drivername} is installed: {installs}.")


def _check_driver(url: URL, *, asynchronous: bool) -> None:
    shown = without_secrets(url)
    try:
        dialect = url.get_dialect()
    except (NoSuchModuleError, ValueError):  # two `+`
        raise ConfigurationError(
            f"SQLAlchemy knows no dialect and driver for {shown}. Check the part before `://`; "
            "a database that is not built in needs its dialect's package installed."
        ) from None
    if asynchronous:
        dialect = dialect.get_async_dialect_cls(url)
    if dialect.is_async != asynchronous:
        drivers = " or ".join(_ASYNC_DRIVERS.get(url.get_backend_name(), ("another driver",)))
        raise ConfigurationError(
            f"The driver of {shown} blocks, and AsyncDatabase needs one for asyncio. "
            f"Use {drivers}, or a SyncDatabase."
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
