"""The promises about which driver serves a database URL, and about what never works."""

import sys
import traceback
from typing import Any

import pytest
from conftest import AnyDatabase
from sqlalchemy import URL, make_url

from asgi_dbsession import AsyncDatabase, ConfigurationError, DBSessionMiddleware, SyncDatabase

BOTH = pytest.mark.parametrize("database_class", [AsyncDatabase, SyncDatabase])


def refused(database_class: type[AnyDatabase], url: Any) -> str:
    """What the error says, with all that a traceback would show around it."""
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
    """As hosting providers write it, for either kind; the rest of the URL stays as it is."""
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
    """With everything else that the URL says, given as text or as a `URL`."""
    assert AsyncDatabase(url).url == make_url(url)
    assert AsyncDatabase(make_url(url)).url == make_url(url)
    (database,) = DBSessionMiddleware(AsyncDatabase, make_url(url)).databases  # type: ignore[arg-type]
    assert database.url == make_url(url)


@pytest.mark.parametrize("url", ["postgresql+psycopg://app@db/shop", "sqlite+pysqlite:///shop.db"])
def test_a_blocking_driver_that_is_named_is_kept(url: str) -> None:
    """And psycopg is one of both kinds."""
    assert SyncDatabase(url).url == make_url(url)


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("sqlite+pysqlite:///shop.db", r"Use aiosqlite, or a SyncDatabase"),
        # not installed here, and nobody should be sent to install it
        ("postgresql+psycopg2://app@db/shop", r"Use asyncpg or psycopg, or a SyncDatabase"),
        ("mysql+pymysql://app@db/shop", r"Use asyncmy or aiomysql, or a SyncDatabase"),
    ],
)
def test_a_driver_that_blocks_is_refused_by_an_async_database(url: str, cure: str) -> None:
    """Before it can block the event loop; the error names those that do not."""
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
    """Its statements could only be run in an event loop."""
    with pytest.raises(ConfigurationError, match="Leave the driver out, or use an AsyncDatabase"):
        SyncDatabase(url)


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
    """The error says where to look, and hides the password."""
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
    """Half a URL may hold a whole password: neither the message nor its causes repeat it."""
    said = refused(database_class, given)
    assert ("None is not a database URL" in said) == (given is None)
    assert "Write `dialect://user:password@host:port/name`" in said
    assert "hush" not in said
    assert "direct cause" not in said
    assert "another exception occurred" not in said


@BOTH
def test_a_password_that_was_not_percent_encoded_does_not_leak_into_the_host(
    database_class: type[AnyDatabase],
) -> None:
    """`app:hu@sh@db` reads as the host `sh@db`, which every later message would show."""
    said = refused(database_class, "postgresql://app:b@hush@db/shop")
    assert "percent-encoded" in said
    assert "hush" not in said


@BOTH
def test_special_characters_in_a_password_are_fine_when_encoded(
    database_class: type[AnyDatabase],
) -> None:
    """By hand, or by `URL.create`."""
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
    """The error has the command, with the name on PyPI, which is not always the driver's."""
    for module in ("asyncmy", "aiomysql", "pymysql"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it could not be imported
    said = refused(database_class, url)
    for package in packages:
        assert f"`pip install {package}`" in said
    assert "hush" not in said
