"""Translates options in a PostgreSQL URL into options of the Python driver."""

from importlib import import_module

from sqlalchemy import URL

from .options import UrlOptions, is_on, take_ssl_mode

_MODES = ("allow", "disable", "prefer", "require", "verify-ca", "verify-full")
# The options of libpq (PostgreSQL's C library) that asyncpg accepts only in its argument `dsn`. So
# `for_asyncpg` moves these options from the database URL into a `dsn`.
_DSN_ONLY = (
    "application_name",
    "options",
    "sslcert",
    "sslcrl",
    "sslkey",
    "sslpassword",
    "sslrootcert",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
)


def _for_postgresql(options: UrlOptions) -> None:
    """Remove an option that asks for UTF-8, because all drivers of PostgreSQL use UTF-8."""
    for name in ("charset", "encoding", "client_encoding"):
        if str(options.query.get(name)).lower().replace("-", "") in ("utf8", "unicode", "utf8mb4"):
            options.take(name)


def for_asyncpg(options: UrlOptions) -> None:
    """Translate options in a URL for the driver asyncpg."""
    _for_postgresql(options)
    mode = take_ssl_mode(options, _MODES)
    if mode is not None:
        options.query["ssl"] = mode
    if options.query.get("channel_binding") in ("disable", "prefer"):
        # asyncpg never uses channel binding (a protection of the login over TLS), and has no option
        # for it. So the values "disable" and "prefer" change nothing.
        options.take("channel_binding")
    if is_on(options.take("pgbouncer")):
        options.arguments |= {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": _no_name,
        }
    options.number("connect_timeout", float, to="timeout")
    for name in ("timeout", "command_timeout"):
        options.number(name, float)
    for name in ("statement_cache_size", "max_cached_statement_lifetime"):
        options.number(name, int)
    dsn = {name: options.query.pop(name) for name in _DSN_ONLY if name in options.query}
    if dsn and "dsn" not in options.query:
        options.query["dsn"] = str(URL.create("postgresql", query=dsn))


def for_psycopg(options: UrlOptions) -> None:
    """Translate options in a URL for the driver psycopg."""
    _for_postgresql(options)
    mode = take_ssl_mode(options, _MODES)
    if mode is not None:
        options.query["sslmode"] = mode
    if is_on(options.take("pgbouncer")):
        options.arguments["prepare_threshold"] = None
    for name in ("statement_cache_size", "prepared_statement_cache_size"):
        if options.take(name) == "0":
            options.arguments["prepare_threshold"] = None
    options.number("prepare_threshold", int)
    if (seconds := options.take("timeout")) is not None:
        options.query["connect_timeout"] = seconds


def _no_name() -> str:
    # PgBouncer may run each transaction on another connection to the server, where a prepared
    # statement with a name does not exist. A statement without a name is prepared again each time.
    return ""


def known_to_psycopg() -> set[str]:
    """Return the names of all connection options that psycopg knows."""
    libpq = import_module("psycopg").pq.Conninfo.get_defaults()
    names = {each.keyword.decode() for each in libpq}
    return names | {"autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory"}
