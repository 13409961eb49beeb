"""Tests the page on isolation levels and read-only transactions of one request."""

import importlib
import re
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pgbouncer
import postgres
import pytest
from asgi import get, respond
from conftest import ENTRY, SQLALCHEMY, Running, maria_database
from fastapi import Depends, HTTPException
from pages import Page
from sqlalchemy import URL, create_engine, select, text
from sqlalchemy.exc import DBAPIError, SAWarning
from sqlalchemy.pool import NullPool

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

pytestmark = pytest.mark.anyio

KINDS = ("asyncpg", "psycopg", "psycopg-sync")
PAGE = Page("docs/how-to/isolation-levels-and-read-only.md")
STATE = text(
    "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only')"
)
USUAL = ("read committed", "off")
ONE: dict[str, Any] = {"pool_size": 1, "max_overflow": 0}
AUTOCOMMIT: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"}
QUESTIONS = text(
    "SELECT variable_value FROM information_schema.global_status WHERE variable_name = 'QUESTIONS'"
)
SNAPSHOT = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}


@pytest.fixture(scope="module")
def url() -> URL:
    """A database that logs every statement on the server."""
    url = postgres.new_database("isolation").set(drivername="postgresql+asyncpg")
    engine = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("ALTER DATABASE isolation SET log_statement = 'all'"))
        ENTRY.create(connection)
    return url


@pytest.fixture
def reports(url: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of the page, with one connection for each of their databases."""
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in PAGE.files().items():
        one = code.replace("from_env(", "from_env(pool_size=1, max_overflow=0, ")
        assert one != code
        (tmp_path / name).write_text(one)
    importlib.invalidate_caches()
    yield importlib.import_module("reports")
    for name in ("bank", "reports"):
        sys.modules.pop(name)


@asynccontextmanager
async def statements() -> AsyncIterator[list[str]]:
    """Return the statements that reach the server, without those of the driver itself."""
    log = Path(postgres.server().pgdata) / "log"
    before = len(log.read_text())
    found: list[str] = []
    yield found
    lines = log.read_text()[before:].splitlines()
    found.extend(
        line.split(": ", 2)[-1].strip(";").strip()
        for line in lines
        if "statement: " in line or "execute " in line
    )


async def test_the_handlers_of_the_page_have_what_they_ask_for(reports: Any) -> None:
    """The level is part of BEGIN."""
    bank = sys.modules["bank"]
    async with bank.database:
        async with statements() as seen:
            exchange = await get(bank.app, "/transfer", method="POST")
            assert exchange.body == b'"serializable"'
        assert [each.split()[0] for each in seen] == ["BEGIN", "SHOW", "COMMIT"]
        assert (await get(bank.app, "/balance")).body == b'"on"'


@pytest.mark.parametrize("outcome", ["stored", "refused", "raised"])
async def test_the_next_request_has_the_default_again(reports: Any, outcome: str) -> None:
    """The next request on the same connection has the default level again."""
    bank = sys.modules["bank"]
    seen = []

    @bank.app.get("/state")  # type: ignore[untyped-decorator]
    async def state() -> None:
        session = get_session()
        process = await session.scalar(text("SELECT pg_backend_pid()"))
        seen.append((process, *(await session.execute(STATE)).one()))

    @bank.app.get("/leave", dependencies=[Depends(bank.snapshot)])  # type: ignore[untyped-decorator]
    async def leave() -> None:
        await state()
        if outcome == "refused":
            raise HTTPException(409)
        if outcome == "raised":
            raise RuntimeError

    async with bank.database:
        for path in ("/state", "/leave", "/state"):
            await get(bank.app, path)
    process = seen[0][0]
    assert seen == [(process, *USUAL), (process, "repeatable read", "on"), (process, *USUAL)]


async def test_it_lasts_for_one_transaction(running: Running) -> None:
    """After a commit in the middle, the level must be set again, with every driver."""
    seen = []

    async def ask() -> None:
        await running.call("connection", None, SNAPSHOT)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for before in (ask, lambda: running.call("commit"), lambda: running.call("rollback"), ask):
            await before()
            seen.append(tuple((await running.execute(STATE)).one()))
            await running.call("commit")
        await respond(send)

    await get(DBSessionMiddleware(app, running.database))
    assert seen == [("repeatable read", "on"), USUAL, USUAL, ("repeatable read", "on")]


async def test_asked_for_too_late_it_warns(running: Running) -> None:
    """The level has no effect; SQLAlchemy warns, and the page shows how to make it an error."""
    (advice,) = re.findall(r"`(warnings\..*?)`", PAGE.text)
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(text("SELECT 1"))
        with pytest.warns(SAWarning, match="Connection is already established"):
            await running.call("connection", None, SNAPSHOT)
        seen.append(tuple((await running.execute(STATE)).one()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(advice)
            with pytest.raises(SAWarning):
                await running.call("connection", None, SNAPSHOT)
        await respond(send)

    await get(DBSessionMiddleware(app, running.database))
    assert seen == [USUAL]


async def test_it_applies_through_pgbouncer(url: URL) -> None:
    """No other user of the same server connection gets the level."""
    arguments = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    seen = []
    async with AsyncDatabase(pgbouncer.url_through(url), connect_args=arguments, **ONE) as database:
        for number in range(20):
            async with database.begin() as session:
                if number % 2:
                    await session.connection(execution_options=SNAPSHOT)
                seen.append(tuple((await session.execute(STATE)).one()))
    assert seen == [USUAL, ("repeatable read", "on")] * 10


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_unit_that_may_only_read_sends_no_more_than_another(url: URL, driver: str) -> None:
    """READ ONLY is a part of BEGIN; a plain read needs neither BEGIN nor COMMIT."""
    async with AsyncDatabase(url.set(drivername=f"postgresql+{driver}"), **ONE) as database:
        async with statements() as plain, database.begin(read_only=True) as session:
            await session.execute(select(ENTRY.c.id))
        async with statements() as more, database.begin(read_only=True) as session:
            assert tuple((await session.execute(STATE)).one()) == ("read committed", "on")
    assert [each.split()[0] for each in plain] == ["SELECT"]
    assert [each.split()[0] for each in more] == ["BEGIN", "SELECT", "COMMIT"]
    assert "READ ONLY" in more[0]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_reading_only_applies_through_pgbouncer(url: URL, driver: str) -> None:
    """And to nobody else who gets the same connection of the server."""
    through = pgbouncer.url_through(url.set(drivername=f"postgresql+{driver}"))
    seen = []
    async with AsyncDatabase(through.update_query_dict({"pgbouncer": "true"}), **ONE) as database:
        for number in range(20):
            async with database.begin(read_only=bool(number % 2)) as session:
                await session.execute(select(ENTRY.c.id))
                seen.append(tuple((await session.execute(STATE)).one()))
    assert seen == [USUAL, ("read committed", "on")] * 10


async def test_in_autocommit_a_select_is_all_that_is_sent(reports: Any) -> None:
    """There is no BEGIN and no COMMIT, and nothing is sent when the connection is returned."""
    async with reports.database, reports.reports, statements() as seen:
        assert (await get(reports.app, "/accounts")).body == b"42"
    assert seen == ["SELECT 42"]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_what_autocommit_gives_up(url: URL, driver: str) -> None:
    """Streams, savepoints, `SET LOCAL` and locks need a transaction; nothing is rolled back."""
    url = url.set(drivername=f"postgresql+{driver}")
    async with AsyncDatabase(url, isolation_level="AUTOCOMMIT") as database:
        async with database.begin() as session:
            with pytest.raises(DBAPIError, match="transaction"):
                await session.stream(text("SELECT 1"))
            with pytest.raises(DBAPIError, match="transaction block"):
                async with session.begin_nested():
                    await session.execute(text("SELECT 1"))
        async with database.begin() as session:
            await session.execute(text("SET LOCAL work_mem = '123kB'"))
            assert await session.scalar(text("SHOW work_mem")) != "123kB"
            await session.execute(ENTRY.insert().values(note=driver))
            await session.rollback()
            query = text("SELECT note FROM entry WHERE note = :note FOR UPDATE")
            assert await session.scalar(query, {"note": driver}) == driver
            held = "SELECT count(*) FROM pg_locks WHERE relation = 'entry'::regclass"
            assert await session.scalar(text(held)) == 0


PSYCOPG = re.findall(r"`(connect_args=.*?)`", PAGE.text)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_in_autocommit_the_server_refuses_writes(reports: Any, url: URL, driver: str) -> None:
    """No later statement fails, because no transaction was aborted."""
    database = reports.reports
    if driver == "psycopg":
        options = eval(f"dict({PSYCOPG[0]})", {})
        url = url.set(drivername="postgresql+psycopg")
        database = AsyncDatabase(url, isolation_level="AUTOCOMMIT", **options)
    async with database, database.begin() as session:
        with pytest.raises(DBAPIError, match="read-only"):
            await session.execute(ENTRY.insert().values(note="refused"))
        assert await session.scalar(text("SELECT 42")) == 42


@pytest.mark.parametrize("driver", ["asyncmy", "aiomysql"])
async def test_on_mariadb_a_level_lasts_for_one_transaction_too(driver: str) -> None:
    """The level is set on the connection, and reset before anyone else uses the connection."""
    url, _ = maria_database()
    level = text("SELECT @@tx_isolation")
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = get_session()
        if scope["path"] == "/serializable":
            await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        seen.append(await session.scalar(level))
        await session.commit()
        seen.append(await session.scalar(level))
        await respond(send)

    async with AsyncDatabase(url.set(drivername=f"mysql+{driver}"), **ONE) as database:
        middleware = DBSessionMiddleware(app, database)
        for path in ("/serializable", "/"):
            await get(middleware, path)
    assert seen == ["SERIALIZABLE", *["REPEATABLE-READ"] * 3]


@pytest.mark.skipif(
    SQLALCHEMY < (2, 0, 43),
    reason="skip_autocommit_rollback came with SQLAlchemy 2.0.43",
)
@pytest.mark.parametrize("driver", ["asyncmy", "aiomysql"])
async def test_in_autocommit_mariadb_is_sent_a_commit_too(driver: str) -> None:
    """By default there is a ROLLBACK too."""
    url, reader = maria_database()
    url = url.set(drivername=f"mysql+{driver}")
    found = []
    for options in (AUTOCOMMIT, AUTOCOMMIT | {"skip_autocommit_rollback": True}):
        async with AsyncDatabase(url, **options) as database:
            with reader.connect() as connection:
                before = int(connection.scalar(QUESTIONS) or 0)
                async with database.begin() as session:
                    await session.scalar(text("SELECT 42"))
                found.append(int(connection.scalar(QUESTIONS) or 0) - before - 1)
    assert found == [3, 2]
