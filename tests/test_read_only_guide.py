"""The page on read-only requests does what it says."""

import importlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import postgres
import pytest
from asgi import get
from pages import Page
from sqlalchemy import URL, insert, select, text

from asgi_dbsession import ForbiddenWrite

pytestmark = pytest.mark.anyio
PAGE = Page("docs/how-to/read-only-requests.md")


@pytest.fixture(scope="module")
def url() -> URL:
    """An empty database."""
    return postgres.new_database("read_only_guide").set(drivername="postgresql+asyncpg")


@pytest.fixture
async def accounts(url: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """The main module of the page, running, with one account."""
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in PAGE.files().items():
        (tmp_path / name).write_text(code)
    importlib.invalidate_caches()
    module = importlib.import_module("accounts")
    async with module.database as database:
        async with database.engine.begin() as connection:
            await connection.run_sync(module.Base.metadata.drop_all)
            await connection.run_sync(module.Base.metadata.create_all)
            await connection.execute(insert(module.Account).values(name="ann", password="right"))
        yield module
    for name in PAGE.files():
        sys.modules.pop(name.removesuffix(".py"), None)


async def stored(accounts: Any) -> Any:
    """What is there."""
    async with accounts.database.begin() as session:
        return tuple((await session.execute(text("SELECT password, seen FROM account"))).one())


async def test_the_mistake_of_the_page_fails_the_request(accounts: Any) -> None:
    """With the text that the page quotes, and nothing is stored."""
    exchange = await get(accounts.app, "/accounts/ann")
    assert isinstance(exchange.error, ForbiddenWrite)
    (quoted,) = PAGE.blocks("text")
    said = " ".join(quoted.split()).partition(", so")[2]
    assert str(exchange.error).partition(", so")[2] == said
    assert await stored(accounts) == ("right", 0)


async def test_begin_in_it_may_write(accounts: Any) -> None:
    """It is a unit of work of its own."""
    importlib.import_module("views")
    exchange = await get(accounts.app, "/seen/ann")
    assert (exchange.status, exchange.error) == (200, None)
    assert await stored(accounts) == ("right", 1)


async def test_the_function_reads_alone_and_as_a_part_of_a_unit(accounts: Any) -> None:
    """It counts what the unit has written."""
    count = importlib.import_module("report").count_accounts
    assert await count() == 1
    async with accounts.database.begin() as session:
        session.add(accounts.Account(name="bob", password="right"))
        assert await count() == 2


async def test_a_rule_of_the_applications_own(accounts: Any) -> None:
    """A POST that searches may only read; another POST may write."""
    reads_only = importlib.import_module("search").reads_only
    for method, path, expected in [
        ("GET", "/", True),
        ("POST", "/search", True),
        ("POST", "/", False),
    ]:
        assert reads_only({"type": "http", "method": method, "path": path}) is expected


async def test_what_postgresql_refuses_and_allows(accounts: Any) -> None:
    """As the page says below its tables."""
    for statement in (select(accounts.Account).with_for_update(), text("SELECT nextval('s')")):
        async with accounts.database.begin() as session:
            await session.execute(text("CREATE SEQUENCE IF NOT EXISTS s"))
        with pytest.raises(Exception, match="read-only transaction"):
            async with accounts.database.begin(read_only=True) as session:
                await session.execute(statement)
    async with accounts.database.begin(read_only=True) as session:
        for allowed in ("NOTIFY news, 'x'", "SELECT pg_advisory_xact_lock(1)"):
            await session.execute(text(allowed))
