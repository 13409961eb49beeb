"""The URLs of hosting providers become what their page says, for each driver."""

import re
from pathlib import Path
from ssl import CERT_NONE, CERT_REQUIRED
from typing import Any

import pytest
from pages import Page
from sqlalchemy import make_url

from asgi_dbsession import AsyncDatabase, ConfigurationError, SyncDatabase

PAGE = Page("docs/how-to/hosting-providers.md")
ROWS = re.findall(r"^\| ([^|]+) \| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", PAGE.text, re.MULTILINE)


def added(cell: str) -> str:
    """What the page tells the reader to add to the URL."""
    return "".join(re.findall(r"^add `([^`]+)`", cell))


CASES = [
    (url.replace("…", "app:secret@host") + added(cell), driver, cell)
    for _provider, url, first, second in ROWS
    if "://" in url
    for driver, cell in zip(
        ("asyncmy", "aiomysql") if url.startswith("mysql") else ("asyncpg", "psycopg"),
        (first, second),
        strict=True,
    )
]


def described(url: str, driver: str) -> AsyncDatabase | SyncDatabase:
    """The database of that URL, with that driver."""
    backend = "mysql" if url.startswith("mysql") else "postgresql"
    named = make_url(url).set(drivername=f"{backend}+{driver}")
    return SyncDatabase(named) if driver == "pymysql" else AsyncDatabase(named)


def arguments_of(database: AsyncDatabase | SyncDatabase) -> dict[str, Any]:
    """What the driver gets beside the URL."""
    arguments: dict[str, Any] = database._engine_options.get("connect_args", {})
    return arguments


def test_the_tables_are_read() -> None:
    """Each row twice: a test that finds no row proves nothing."""
    assert len(CASES) == 30
    assert {provider for provider, *_ in ROWS} >= {"Heroku", "Neon", "AWS RDS", "PlanetScale"}


@pytest.mark.parametrize(("url", "driver", "cell"), CASES)
def test_a_url_becomes_what_the_page_says(url: str, driver: str, cell: str) -> None:
    """Options in the words of the driver, or an error with the cure."""
    if cell.startswith("refused"):
        named = "channel_binding" if driver == "asyncpg" else "asyncmy"
        with pytest.raises(ConfigurationError, match=named):
            described(url, driver)
        return
    database = described(url, driver)
    assert (database.url.password, database.url.host) == (
        "secret",
        None if "/cloudsql" in url else "host",
    )
    arguments = arguments_of(database)
    if cell.startswith("encrypted"):
        expected = CERT_REQUIRED if "checked" in cell else CERT_NONE
        for each in ("asyncmy", "pymysql"):
            assert arguments_of(described(url, each))["ssl"].verify_mode == expected
        return
    options = dict(each.split("=", 1) for each in re.findall("`([^`?][^`]*)`", cell))
    assert dict(database.url.query) == options
    no_prepared = {"statement_cache_size", "prepared_statement_cache_size", "prepare_threshold"}
    assert bool(arguments) == ("no prepared statements" in cell)
    assert arguments.keys() <= {*no_prepared, "prepared_statement_name_func"}


@pytest.mark.parametrize("url", sorted({url for url, *_ in CASES if "channel_binding" not in url}))
def test_a_driver_is_found_that_is_installed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The application of the page reads the URL from the environment as it is."""
    monkeypatch.setenv("DATABASE_URL", url)
    expected = "mysql+asyncmy" if url.startswith("mysql") else "postgresql+asyncpg"
    assert PAGE.run(0)["database"].url.drivername == expected


@pytest.mark.parametrize("url", ["postgres://app@db/shop", "postgresql://app@db/shop"])
def test_psycopg_can_be_chosen(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Although asyncpg is installed."""
    monkeypatch.setenv("DATABASE_URL", url)
    assert PAGE.run(1)["database"].url.drivername == "postgresql+psycopg"


POOL = re.findall(r"^`connection_limit`.*?belong", PAGE.text, re.MULTILINE)


@pytest.mark.parametrize("option", re.findall(r"`(\w+)`", POOL[0]))
def test_an_option_of_the_pool_is_named_in_the_error(option: str) -> None:
    """With the engine option to write instead."""
    with pytest.raises(ConfigurationError, match=r"Leave it out, and write `\w+="):
        described(f"postgresql://app@db/shop?{option}=5", "asyncpg")
