"""A password that changes while the application runs, and the page on tokens that expire."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import postgres
import pytest
from asgi import Life, get
from conftest import forget_modules
from pages import Page
from sqlalchemy import URL, Engine, create_engine, event, text
from sqlalchemy.pool import NullPool

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DatabaseUnavailable,
    SyncDatabase,
)

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/tokens.md")


class Token:
    """The password of a user to whom the server gives no access without it."""

    def __init__(self, file: Path) -> None:
        self.url = postgres.new_database("tokens").set(username=postgres.USER_WITH_PASSWORD)
        self.file = file

    def renew(self, token: str) -> None:
        """Change the password on the server and in the file."""
        engine = create_engine(
            postgres.administrator_url(), isolation_level="AUTOCOMMIT", poolclass=NullPool
        )
        name = postgres.USER_WITH_PASSWORD
        with engine.connect() as connection:
            connection.execute(text(f"ALTER ROLE {name} PASSWORD '{token}'"))
        self.file.write_text(token + "\n")


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Token]:
    """A first token, and the environment of the page."""
    made = Token(tmp_path / "token")
    made.renew("first")
    monkeypatch.setenv("TOKEN_FILE", str(made.file))
    monkeypatch.setenv("DATABASE_URL", made.url.render_as_string())
    monkeypatch.syspath_prepend(str(tmp_path))
    yield made
    forget_modules("shop", "reports")


def module(name: str, folder: Path) -> ModuleType:
    """A module of the page."""
    (folder / f"{name}.py").write_text(PAGE.files()[f"{name}.py"])
    __import__(name)
    return sys.modules[name]


async def test_the_application_of_the_page_connects_with_each_new_token(
    token: Token, tmp_path: Path
) -> None:
    """At startup, and after the token has changed."""
    shop = module("shop", tmp_path)
    life = await Life(shop.app).startup()
    assert (await get(shop.app)).body == b"42"
    token.renew("second")
    assert (await get(shop.app)).body == b"42"  # on the connection that is open
    await shop.database.engine.dispose()
    assert (await get(shop.app)).body == b"42"  # on a new connection
    await life.shutdown()


async def test_asyncpg_awaits_the_function_of_the_page(token: Token, tmp_path: Path) -> None:
    """For each new connection."""
    database = module("reports", tmp_path).reports
    async with database:
        token.renew("second")
        await database.engine.dispose()
        await database.ping()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "psycopg-sync"])
async def test_the_first_connection_calls_the_listeners(token: Token, driver: str) -> None:
    """Other events of the engine are called too, and each engine is passed to `on_engine`."""
    engines: list[Engine] = []
    connected: list[Any] = []

    def prepare(engine: Engine) -> None:
        engines.append(engine)
        event.listen(engine, "connect", lambda *_: connected.append(engine))

        @event.listens_for(engine, "do_connect")
        def set_password(_dialect: Any, _record: Any, _args: Any, options: Any) -> None:
            options["password"] = token.file.read_text().strip()

    url: URL = token.url.set(drivername=f"postgresql+{driver.removesuffix('-sync')}")
    kind = SyncDatabase if driver.endswith("-sync") else AsyncDatabase
    database: Any = kind(url, on_engine=prepare)
    for number in (1, 2):
        token.renew(f"token {number}")
        async with database:
            assert (len(engines), len(connected)) == (number, number)
            assert engines[-1] is getattr(database.engine, "sync_engine", database.engine)
    if kind is SyncDatabase:
        with database:
            assert len(connected) == 3


@pytest.mark.parametrize("kind", [AsyncDatabase, SyncDatabase])
async def test_the_error_without_a_password_names_the_argument(token: Token, kind: Any) -> None:
    """Somebody who has tokens finds `on_engine`."""
    with pytest.raises(DatabaseUnavailable, match="`do_connect` listener that `on_engine` adds"):
        await kind(token.url).startup()


async def test_an_error_of_the_function_ends_the_startup(token: Token) -> None:
    """The error passes unchanged, and nothing runs."""

    def fail(_engine: Engine) -> None:
        raise LookupError

    database = AsyncDatabase(token.url, on_engine=fail)
    with pytest.raises(LookupError):
        await database.startup()
    assert not database.is_running


async def prepare_later(engine: Engine) -> None:
    """A function that nobody would await."""


@pytest.mark.parametrize("wrong", [prepare_later, "prepare"])
def test_only_a_plain_function_is_accepted(wrong: Any) -> None:
    """A coroutine would never run."""
    with pytest.raises(ConfigurationError, match="takes a plain function"):
        AsyncDatabase("sqlite://", on_engine=wrong)
