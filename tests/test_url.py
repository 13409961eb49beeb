"""Tests which driver is chosen for a database URL, and which URLs are refused."""

import sys
import traceback
from pathlib import Path
from ssl import CERT_NONE, CERT_REQUIRED
from typing import Any

import pytest
from conftest import AnyDatabase, real_database
from sqlalchemy import URL, func, make_url, select

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DatabaseUnavailable,
    DBSessionMiddleware,
    SyncDatabase,
)

pytestmark = pytest.mark.anyio

BOTH = pytest.mark.parametrize("database_class", [AsyncDatabase, SyncDatabase])


def refused(database_class: type[AnyDatabase], url: Any) -> str:
    """Return the error text with everything that a traceback would show."""
    with pytest.raises(ConfigurationError) as caught:
        database_class(url)
    return "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("url", "asynchronous", "blocking"),
    [
        ("postgresql://app@db/shop", "postgresql+asyncpg", "postgresql+psycopg"),
        ("postgres://app@db/shop", "postgresql+asyncpg", "postgresql+psycopg"),
        ("mysql://app@db/shop", "mysql+asyncmy", "mysql+pymysql"),
        ("mariadb://app@db/shop", "mariadb+asyncmy", "mariadb+pymysql"),
        ("sqlite:///shop.db", "sqlite+aiosqlite", "sqlite+pysqlite"),
    ],
)
def test_a_url_without_a_driver_gets_one_that_is_installed(
    url: str, asynchronous: str, blocking: str
) -> None:
    """A URL of a hosting provider works for async and sync; the rest of the URL stays the same."""
    rest = make_url(url.replace("postgres:", "postgresql:"))
    assert AsyncDatabase(url).url == rest.set(drivername=asynchronous)
    assert SyncDatabase(url).url == rest.set(drivername=blocking)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+asyncpg://app:hush@db:5433/shop?ssl=require",
        "postgresql+psycopg://app@/shop?host=/run",
        "mariadb+asyncmy://app@db/shop?charset=utf8mb4",
        "mysql+aiomysql://app@db/shop",
        "sqlite+aiosqlite:///shop.db",
    ],
)
def test_an_async_driver_that_is_named_is_kept(url: str) -> None:
    """All other parts of the URL stay, given as text or as a `URL`."""
    assert AsyncDatabase(url).url == make_url(url)
    assert AsyncDatabase(make_url(url)).url == make_url(url)
    (database,) = DBSessionMiddleware(AsyncDatabase, make_url(url)).databases  # type: ignore[arg-type]
    assert database.url == make_url(url)


@pytest.mark.parametrize("url", ["postgresql+psycopg://app@db/shop", "sqlite+pysqlite:///shop.db"])
def test_a_blocking_driver_that_is_named_is_kept(url: str) -> None:
    """A named driver is kept; psycopg works for async and sync."""
    assert SyncDatabase(url).url == make_url(url)


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("sqlite+pysqlite:///shop.db", r"Use aiosqlite, or a SyncDatabase"),
        # not installed here, and the error must not advise to install it
        ("postgresql+psycopg2://app@db/shop", r"Use asyncpg or psycopg, or a SyncDatabase"),
        ("mysql+pymysql://app@db/shop", r"Use asyncmy or aiomysql, or a SyncDatabase"),
    ],
)
def test_a_driver_that_blocks_is_refused_by_an_async_database(url: str, cure: str) -> None:
    """The error comes before the driver can block the event loop, and names async drivers."""
    with pytest.raises(ConfigurationError, match=cure):
        AsyncDatabase(url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+asyncpg://app@db/shop",
        "postgresql+psycopg_async://app@db/shop",
        "sqlite+aiosqlite:///shop.db",
        "mysql+asyncmy://app@db/shop",
        "mariadb+aiomysql://app@db/shop",
    ],
)
def test_an_asyncio_driver_is_refused_by_a_sync_database(url: str) -> None:
    """The statements of this driver need an event loop."""
    with pytest.raises(ConfigurationError, match="Leave the driver out, or use an AsyncDatabase"):
        SyncDatabase(url)


HEROKU = "postgres://u:pw@ec2.compute.amazonaws.com:5432/d"
# URLs of providers (with short hosts), and their translation for an asyncio driver.
HANDED_OUT = [
    (HEROKU, {}, {}),
    (HEROKU + "?sslmode=require", {"ssl": "require"}, {}),
    ("postgresql://u:pw@ep-x.neon.tech/d?sslmode=require&channel_binding=prefer",
     {"ssl": "require"}, {}),
    ("postgres://doadmin:pw@x.db.ondigitalocean.com:25060/d?sslmode=require",
     {"ssl": "require"}, {}),
    ("postgres://avnadmin:pw@x.aivencloud.com:1/d?sslmode=verify-full", {"ssl": "verify-full"}, {}),
    ("postgres://u:pw@x.postgres.database.azure.com/d?ssl=true", {"ssl": "require"}, {}),
    ("postgres://u:pw@h/d?ssl-mode=DISABLED", {"ssl": "disable"}, {}),
    ("postgres://u:pw@h/d?connect_timeout=10&command_timeout=2.5", {},
     {"timeout": 10.0, "command_timeout": 2.5}),
    ("postgres://u:pw@h/d?statement_cache_size=0", {}, {"statement_cache_size": 0}),
    ("postgres://u:pw@h/d?charset=utf8&encoding=UTF-8", {}, {}),
    ("postgres://u:pw@h/d?pgbouncer=false", {}, {}),
    ("postgres://u:pw@h/d?application_name=shop&sslrootcert=/ca.pem",
     {"dsn": "postgresql://?application_name=shop&sslrootcert=%2Fca.pem"}, {}),
]  # fmt: skip


def arguments_of(database: AnyDatabase) -> dict[str, Any]:
    """Return the arguments that a database gives its driver beside the URL."""
    arguments: dict[str, Any] = database._engine_options.get("connect_args", {})
    return arguments


@pytest.mark.parametrize(("url", "query", "arguments"), HANDED_OUT, ids=lambda value: str(value))
def test_a_url_of_a_provider_is_translated_for_asyncpg(
    url: str, query: dict[str, str], arguments: dict[str, Any]
) -> None:
    """An option with another name for the same thing is translated; numbers become numbers."""
    database = AsyncDatabase(url)
    assert (dict(database.url.query), arguments_of(database)) == (query, arguments)


@pytest.mark.parametrize("database_class", [AsyncDatabase, SyncDatabase])
@pytest.mark.parametrize(
    ("query", "expected", "arguments"),
    [
        ("sslmode=require&channel_binding=require", "as it is", {}),
        ("sslmode=verify-full&sslrootcert=/ca.pem&options=endpoint%3Dx", "as it is", {}),
        ("ssl=true", {"sslmode": "require"}, {}),
        ("ssl-mode=REQUIRED&timeout=5", {"sslmode": "require", "connect_timeout": "5"}, {}),
        ("pgbouncer=true", {}, {"prepare_threshold": None}),
        ("prepared_statement_cache_size=0", {}, {"prepare_threshold": None}),
        ("prepare_threshold=7", {}, {"prepare_threshold": 7}),
        ("charset=utf8", {}, {}),
    ],
)
def test_a_url_of_a_provider_is_translated_for_psycopg(
    database_class: type[AnyDatabase], query: str, expected: Any, arguments: dict[str, Any]
) -> None:
    """Options of libpq stay unchanged."""
    url = f"postgresql+psycopg://u:pw@h/d?{query}"
    database = database_class(url)
    stays = dict(make_url(url).query) if expected == "as it is" else expected
    assert (dict(database.url.query), arguments_of(database)) == (stays, arguments)


@pytest.mark.parametrize(
    ("database_class", "driver"),
    [(AsyncDatabase, "asyncmy"), (AsyncDatabase, "aiomysql"), (SyncDatabase, "pymysql")],
)
def test_the_encoding_is_translated_for_mysql(
    database_class: type[AnyDatabase], driver: str
) -> None:
    """The drivers call it `charset`."""
    database = database_class(f"mysql+{driver}://u:pw@h/d?encoding=utf8mb4")
    assert dict(database.url.query) == {"charset": "utf8mb4"}


@pytest.mark.parametrize("driver", ["asyncmy", "pymysql"])
@pytest.mark.parametrize(
    ("query", "mode"),
    [
        ("ssl-mode=REQUIRED", CERT_NONE),
        ("sslmode=require", CERT_NONE),
        ("ssl_mode=VERIFY_CA", CERT_REQUIRED),
        ("ssl-mode=VERIFY_IDENTITY", CERT_REQUIRED),
        ("sslaccept=strict", CERT_REQUIRED),
        ("sslaccept=accept_invalid_certs", CERT_NONE),
        ('ssl={"rejectUnauthorized":true}', CERT_REQUIRED),
        ("ssl_verify_cert=true&ssl_verify_identity=true", CERT_REQUIRED),
        ("ssl-mode=DISABLED", None),
    ],
)
def test_a_url_of_a_provider_is_translated_for_mysql(driver: str, query: str, mode: Any) -> None:
    """Each driver uses TLS as the option of MySQL's own clients says."""
    database_class: Any = SyncDatabase if driver == "pymysql" else AsyncDatabase
    database = database_class(f"mysql+{driver}://u:pw@h:25060/defaultdb?{query}")
    arguments = arguments_of(database)
    context: Any = arguments.get("ssl")
    assert dict(database.url.query) == {}
    # Without an option, PyMySQL uses TLS if the server offers it; asyncmy does not.
    must_disable = mode is None and driver == "pymysql"
    assert arguments.get("ssl_disabled", False) is must_disable
    assert (context and context.verify_mode) == mode
    if mode == CERT_REQUIRED:
        assert context.check_hostname == ("VERIFY_CA" not in query)


@pytest.mark.parametrize("mode", ["REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY"])
def test_tls_that_a_driver_cannot_insist_on_is_refused(mode: str) -> None:
    """Aiomysql continues without encryption if the server, or an attacker, offers no TLS."""
    said = refused(AsyncDatabase, f"mysql+aiomysql://app:pw@h/d?ssl-mode={mode}")
    assert "use asyncmy" in said
    url = "mysql+aiomysql://app:pw@h/d?ssl-mode=DISABLED"
    assert dict(AsyncDatabase(url).url.query) == {}


@pytest.mark.parametrize("driver", ["asyncmy", "pymysql"])
def test_what_is_given_wins_over_the_url(driver: str) -> None:
    """`connect_args` override options of the URL."""
    database_class: Any = SyncDatabase if driver == "pymysql" else AsyncDatabase
    url = f"mysql+{driver}://u:pw@h/d?ssl-mode=REQUIRED"
    assert arguments_of(database_class(url, connect_args={"ssl": None})) == {"ssl": None}


@pytest.mark.parametrize(
    ("query", "cure"),
    [
        ("channel_binding=require", "or use psycopg"),
        ("connection_limit=5", "pool_size=…, max_overflow=0"),
        ("pool_timeout=5", "`pool_timeout=…`"),
        ("schema=shop", "search_path"),
        ("conn_max_age=60", "pool_recycle"),
        ("sslmode=nonsense", "The value must be one of"),
        ("timeout=hush", "The value must be a number"),
        ("supa=base-pooler.x", "Leave it out"),
        ("pgbouncer=true&nonsense=hush", "the option nonsense in the URL"),
    ],
)
def test_an_option_that_the_driver_does_not_have_is_refused_with_the_cure(
    query: str, cure: str
) -> None:
    """The error does not show the value, which may be a secret."""
    said = refused(AsyncDatabase, f"postgresql+asyncpg://app:pw@db/shop?{query}")
    assert cure in said
    assert "hush" not in said


async def test_pgbouncer_in_a_url_means_no_prepared_statements() -> None:
    """The options are those of the page on drivers for asyncpg."""
    arguments = arguments_of(AsyncDatabase("postgresql+asyncpg://u@h:6543/d?pgbouncer=true"))
    assert arguments.pop("prepared_statement_name_func")() == ""
    assert arguments == {"statement_cache_size": 0, "prepared_statement_cache_size": 0}


@pytest.mark.parametrize("kind", ["asyncpg", "psycopg", "psycopg-sync"])
async def test_a_translated_url_works_on_a_real_postgresql(kind: str, tmp_path: Path) -> None:
    """The option has its effect on the server."""
    real = real_database(kind, tmp_path)
    database_class: Any = SyncDatabase if real.is_sync else AsyncDatabase
    options = {
        "ssl-mode": "PREFERRED",
        "connect_timeout": "9",
        "application_name": "the shop",
        "options": "-c statement_timeout=4321",
        "pgbouncer": "true",
        "charset": "utf8",
    }
    asked = select(
        func.current_setting("application_name"), func.current_setting("statement_timeout")
    )
    async with database_class(real.url.update_query_dict(options)) as database:
        if real.is_sync:
            with database.begin() as session:
                found = session.execute(asked).one()
        else:
            async with database.begin() as session:
                found = (await session.execute(asked)).one()
    assert tuple(found) == ("the shop", "4321ms")
    real.reader.dispose()


@pytest.mark.parametrize("kind", ["asyncmy", "pymysql-sync"])
async def test_a_server_without_tls_does_not_get_what_must_be_encrypted(
    kind: str, tmp_path: Path
) -> None:
    """`ssl-mode=DISABLED` connects, and `REQUIRED` really requires TLS."""
    real = real_database(kind, tmp_path)
    database_class: Any = SyncDatabase if real.is_sync else AsyncDatabase
    url = real.url.set(query={})
    socket = real.url.query
    async with database_class(url.set(query={**socket, "ssl-mode": "DISABLED"})) as database:
        await database.ping()
    with pytest.raises(DatabaseUnavailable):
        await database_class(url.set(query={**socket, "ssl-mode": "REQUIRED"})).startup()
    real.reader.dispose()


@BOTH
@pytest.mark.parametrize(
    "url",
    [
        "nosuch://app:hush@db/shop",
        "nosuch+driver://app:hush@db/shop",
        "postgresql+nosuch://app:hush@db/shop",
        "https://app:hush@db/shop",
    ],
)
def test_an_unknown_dialect_or_driver_is_refused(
    database_class: type[AnyDatabase], url: str
) -> None:
    """The error says what to check, and hides the password."""
    said = refused(database_class, url)
    assert "Check the part before `://`" in said
    assert "hush" not in said


@BOTH
@pytest.mark.parametrize(
    "given",
    [
        "",
        "hush",
        "app:hush@db/shop",
        "postgresql//app:hush@db/shop",
        "postgresql:/app:hush@db/shop",
        "postgresql://app@db:hush/shop",
        "postgresql://app:b@db:hush@db/shop",
        b"postgresql://app:hush@db/shop",
        ["postgresql://app:hush@db/shop"],
        None,
        1,
    ],
    ids=repr,
)
def test_what_is_no_url_is_refused_without_being_quoted(
    database_class: type[AnyDatabase], given: Any
) -> None:
    """A part of a URL may contain a whole password: no message and no cause shows it."""
    said = refused(database_class, given)
    assert ("None is not a database URL" in said) == (given is None)
    assert "Write `dialect://user:password@host:port/name`" in said
    assert "hush" not in said
    assert "direct cause" not in said
    assert "another exception occurred" not in said


@BOTH
@pytest.mark.parametrize("password", ["b@hush", "b@hush/1", "b@1/hush"])
def test_a_password_that_was_not_percent_encoded_does_not_leak_into_the_host_or_name(
    database_class: type[AnyDatabase], password: str
) -> None:
    """`app:hu@sh@db` is read as the host `sh@db`, which later messages would show."""
    said = refused(database_class, f"postgresql://app:{password}@db/shop")
    assert "percent-encoded" in said
    assert "hush" not in said


@BOTH
def test_special_characters_in_a_password_are_fine_when_encoded(
    database_class: type[AnyDatabase],
) -> None:
    """The password is encoded by the user, or by `URL.create`."""
    created = URL.create("postgresql", "app", "b@/:?#[]% hush", "db", 5432, "shop")
    written = "postgresql://app:b%40%2F%3A%3F%23%5B%5D%25%20hush@db:5432/shop"
    for url in (created, written):
        database = database_class(url)
        assert database.url.password == "b@/:?#[]% hush"
        assert database.url.host == "db"
        assert "hush" not in repr(database)


@pytest.mark.parametrize(
    ("database_class", "url", "packages"),
    [
        (AsyncDatabase, "mysql://app:hush@db/shop", ["asyncmy", "aiomysql"]),
        (AsyncDatabase, "mariadb://app:hush@db/shop", ["asyncmy", "aiomysql"]),
        (AsyncDatabase, "mysql+asyncmy://app:hush@db/shop", ["asyncmy"]),
        (AsyncDatabase, "mysql+aiomysql://app:hush@db/shop", ["aiomysql"]),
        (SyncDatabase, "mysql://app:hush@db/shop", ["mysqlclient", "pymysql", "mariadb"]),
        (SyncDatabase, "mysql+pymysql://app:hush@db/shop", ["pymysql"]),
        (SyncDatabase, "mysql+mysqldb://app:hush@db/shop", ["mysqlclient"]),
        (SyncDatabase, "postgresql+psycopg2://app:hush@db/shop", ["psycopg2"]),
    ],
)
def test_a_driver_that_is_not_installed_can_be_installed_by_copy_and_paste(
    database_class: type[AnyDatabase],
    url: str,
    packages: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error shows the command with the name on PyPI, which may differ from the driver's."""
    for module in ("asyncmy", "aiomysql", "pymysql"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it could not be imported
    said = refused(database_class, url)
    for package in packages:
        assert f"`pip install {package}`" in said
    assert "hush" not in said


@pytest.mark.parametrize("database", [AsyncDatabase, SyncDatabase])
@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("postgresql+psycopg://u@h/d?autocommit=true", {}),
        ("postgresql+psycopg://u@h/d", {"connect_args": {"autocommit": True}}),
        ("sqlite://", {"connect_args": {"autocommit": True}}),
    ],
)
def test_autocommit_of_the_driver_is_refused(
    database: Any, url: str, options: dict[str, Any]
) -> None:
    """SQLAlchemy does not know of it, and would roll back in vain."""
    with pytest.raises(ConfigurationError, match='isolation_level="AUTOCOMMIT"'):
        database(url, **options)
