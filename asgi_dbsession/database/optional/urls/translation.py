"""Translates a hosting provider's options in a database URL into options of the Python driver."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import URL

from .mysql import for_mysql
from .options import UrlOptions, known_to
from .postgresql import for_asyncpg, for_psycopg, known_to_psycopg

_CURES = {
    "channel_binding": "Leave it out, or use psycopg (`postgresql+psycopg://`), which has it.",
    "connection_limit": "Leave it out, and write `pool_size=…, max_overflow=0` after the URL.",
    "pool_timeout": "Leave it out, and write `pool_timeout=…` after the URL.",
    "pool": "Leave it out, and write `pool_size=…` after the URL.",
    "pool_size": "Leave it out, and write `pool_size=…` after the URL.",
    "reconnect": "Leave it out, and write `pool_pre_ping=True` after the URL.",
    "conn_max_age": "Leave it out, and write `pool_recycle=…` after the URL.",
}
_SCHEMA_CURES = {
    "asyncpg": 'Leave it out, and write `connect_args={"server_settings": {"search_path": "…"}}`.',
    "psycopg": "Write `options=-csearch_path%3D…` instead.",
}
_SSL_FILES = ("ssl_ca", "ssl_capath", "ssl_cert", "ssl_cipher", "ssl_check_hostname", "ssl_key")
_TRANSLATIONS: dict[str, Callable[[UrlOptions], None]] = {
    "asyncpg": for_asyncpg,
    "psycopg": for_psycopg,
    "psycopg_async": for_psycopg,
    "asyncmy": for_mysql,
    "aiomysql": for_mysql,
    "pymysql": for_mysql,
}
_KNOWN: dict[str, Callable[[], set[str]]] = {
    "asyncpg": known_to("asyncpg", "connect", "prepared_statement_cache_size", "async_fallback"),
    "psycopg": known_to_psycopg,
    "psycopg_async": known_to_psycopg,
    "asyncmy": known_to("asyncmy", "connect", *_SSL_FILES),
    "aiomysql": known_to("aiomysql", "connect", *_SSL_FILES),
    "pymysql": known_to("pymysql.connections", "Connection", *_SSL_FILES),
}


def translate_options(url: URL, given: dict[str, Any]) -> tuple[URL, dict[str, Any]]:
    """Translate the options in a database URL into options that its driver knows.

    Hosting providers write options in the URL that other programs understand, but that the Python
    driver calls by another name. With this function, URLs from Heroku, Neon, Supabase, Render,
    Railway, DigitalOcean, Aiven, Azure and Prisma work unchanged.

    Args:
        url: A URL that names its driver.
        given: The engine options of the application. If an option is in the URL and in
            `connect_args`, the value in `connect_args` is used.

    Returns:
        A pair: (1) the URL with the options that stay in it, (2) the engine options.

    Raises:
        ConfigurationError: The driver has no such option. The error says what to write instead.
    """
    options = UrlOptions(url)
    if options.driver in _TRANSLATIONS:
        _TRANSLATIONS[options.driver](options)
        _refuse_unknown(options)
    arguments = given.get("connect_args", {})
    if options.arguments and isinstance(arguments, dict):
        given = {**given, "connect_args": options.arguments | arguments}
    return url.set(query=options.query), given


def _refuse_unknown(options: UrlOptions) -> None:
    known = _KNOWN[options.driver]()
    for name in options.query:
        if name not in known:
            general = "Leave it out, or write the name that the driver has for it."
            cures = _SCHEMA_CURES if name in ("schema", "currentSchema", "search_path") else {}
            options.refuse(name, cures.get(options.driver) or _CURES.get(name) or general)
