"""Tests the pages for growing applications: services, scripts, workers, migration."""

import asyncio
import gc
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from asgi import Exchange, Life, get
from conftest import ENTRY, Running, postgresql
from fastapi import Depends, FastAPI
from pages import Page
from sqlalchemy import Engine, event, select
from sqlalchemy.orm import Session
from test_guides import Guide

from asgi_dbsession import (
    AsyncDatabase,
    Attempt,
    ConcurrentUse,
    DBSessionMiddleware,
    NoSession,
    get_session,
    session_dependency,
    set_rollback,
)
from asgi_dbsession.retry.retry import log_retry
from asgi_dbsession.retry.watched import WatchedAttempt

SERVICES = Page("docs/how-to/services.md")
RETRY = Page("docs/how-to/retry.md")
ROUTING = Page("docs/how-to/routing-sessions.md")
GET_DB = Page("docs/migrate/get-db.md")

pytestmark = pytest.mark.anyio


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guide]:
    """A folder for modules, and `DATABASE_URL` of a PostgreSQL database."""
    url = postgresql("guides")[0].set(drivername="postgresql+asyncpg")
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = Guide(tmp_path)
    yield found
    found.close()


async def post(app: Any, path: str, content: bytes) -> Any:
    """Send a request that changes data."""
    return await get(app, path, method="POST", content=content)


async def test_a_service_joins_a_request_and_opens_a_unit_in_a_worker(guide: Guide) -> None:
    """A sold-out order is left out completely; the request or the worker stores the rest."""
    shop = guide.load(SERVICES, "shop")
    guide.execute("INSERT INTO product VALUES ('cup', 2), ('pot', 0)")
    async with shop.database:
        exchange = await post(shop.app, "/sales", b'["cup", "pot"]')
        assert (exchange.status, exchange.body) == (200, b'["cup"]')
        assert guide.stored("SELECT product FROM sale") == ["cup"]
        assert shop.sent == ["cup"]
        assert (await post(shop.app, "/sales", b'["pot"]')).status == 409
    worker = guide.load(SERVICES, "worker")
    await worker.main()
    assert guide.stored("SELECT product FROM sale ORDER BY id") == ["cup", "cup"]
    assert guide.stored("SELECT stock FROM product ORDER BY name") == [0, 0]
    assert shop.sent == ["cup", "cup"]


async def test_a_get_or_create_that_50_clients_race_makes_one_tag(guide: Guide) -> None:
    """Each client of the page's route gets the same row, some of them after a retry."""
    tags = guide.load(RETRY, "tags")
    attempts: list[int] = []
    async with tags.database:
        for number in range(20):
            exchanges = await asyncio.gather(
                *(get(tags.app, f"/tags/{number}", method="PUT") for _ in range(50))
            )
            answers = [json.loads(each.body) for each in exchanges]
            made = guide.stored(f"SELECT id FROM tag WHERE name = '{number}'")
            assert {each["id"] for each in answers} == set(made)
            attempts += [each["attempt"] for each in answers]
            if max(attempts) > 1:  # The database decides whether two clients meet.
                return
    pytest.fail("no client met another one")


async def test_a_script_adds_interest_in_transactions(
    guide: Guide, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script of the page runs, also two scripts at the same time."""
    guide.load(RETRY, "bank")
    monthly = guide.load(RETRY, "monthly")
    guide.execute("INSERT INTO account VALUES (1, 100), (2, 200)")
    await asyncio.gather(monthly.main(), monthly.main())
    assert guide.stored("SELECT balance FROM account ORDER BY id") == [106, 212]
    assert "1 106" in capsys.readouterr().out


def test_the_log_line_of_a_retry_on_the_page_is_what_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A reader who searches for it finds the page."""
    (line,) = RETRY.blocks("text")
    failed = WatchedAttempt(Attempt(1, 4), lambda _: False)
    failed.reason = "UniqueViolationError: …"
    with caplog.at_level(logging.INFO, "asgi_dbsession"):
        log_retry("PUT /tags/red", failed, 0.023)
    assert caplog.messages == [line.strip().replace("…", r"\u2026")]


@pytest.mark.parametrize("real", ["sqlite-sync", "psycopg-sync"], indirect=True)
async def test_a_block_in_a_dependency_with_def_and_yield_is_refused(running: Running) -> None:
    """The handler runs in another thread than the block, so its work is not part of the block."""
    app = FastAPI()
    database: Any = running.database

    def session() -> Iterator[Session]:
        with database.begin(join=True) as opened:
            yield opened

    @app.get("/")
    def handler(opened: Annotated[Any, Depends(session)]) -> None:
        opened.execute(ENTRY.insert().values(note="never"))

    exchange = await get(DBSessionMiddleware(app, database))
    assert isinstance(exchange.error, ConcurrentUse)
    assert running.stored() == []


@pytest.mark.parametrize("name", ["two", "routing"])
async def test_reads_go_to_the_reader_and_writes_to_the_writer(
    guide: Guide, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A request reads its own writes from the writer, and locks rows there."""
    url = os.environ["DATABASE_URL"]
    monkeypatch.setenv("WRITER_URL", url)
    monkeypatch.setenv("READER_URL", url)
    guide.execute("CREATE TABLE routed (text TEXT PRIMARY KEY)")
    try:
        module = guide.load(ROUTING, name)
        database: Any = module.database if name == "routing" else module.writer
        life = await Life(module.app).startup()
        engines = {"writer": database.engine.sync_engine, "reader": _reader_of(module)}
        seen: list[str] = []
        for role, engine in engines.items():
            _note_statements(engine, role, seen)
        exchange = Exchange(module.app, "/notes", method="POST")
        exchange.scope["query_string"] = b"note=hello"
        assert (await exchange.run()).status == 200
        assert seen == ["writer INSERT", "writer SELECT"]
        seen.clear()
        assert (await get(module.app, "/notes")).body == b'["hello"]'
        assert seen == ["reader SELECT"]
        if name == "routing":
            seen.clear()
            async with database.begin() as session:
                await session.scalars(select(module.Note.text))
                await session.scalars(select(module.Note.text).with_for_update())
                await session.scalars(select(module.Note.text))
            assert seen == ["reader SELECT", "writer SELECT", "writer SELECT"]
        await life.shutdown()
        assert life.error is None
    finally:
        guide.execute("DROP TABLE routed")


def _reader_of(module: Any) -> Any:
    reader = module.reader
    return (reader.engine if isinstance(reader, AsyncDatabase) else reader).sync_engine


def _note_statements(engine: Engine, role: str, seen: list[str]) -> None:
    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(f"{role} {statement.split(maxsplit=1)[0]}")

    event.listen(engine, "before_cursor_execute", note)


async def with_next(dependency: Any) -> None:
    next(dependency())


async def with_async_for(dependency: Any) -> None:
    async for _ in dependency():
        pass


async def with_contextmanager(dependency: Any) -> None:
    with contextmanager(dependency)():
        pass


async def with_asynccontextmanager(dependency: Any) -> None:
    async with asynccontextmanager(dependency)():
        pass


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "use", [with_next, with_async_for, with_contextmanager, with_asynccontextmanager]
)
async def test_session_dependency_used_as_get_db_raises_what_the_page_says(use: Any) -> None:
    """A reader who searches for the error finds the page with the solution."""
    (errors,) = [each for each in GET_DB.blocks("text") if "TypeError" in each]
    with pytest.raises(TypeError) as raised:
        await use(session_dependency)
    gc.collect()
    assert f"TypeError: {raised.value}" in errors.splitlines()


async def test_a_get_db_that_yields_the_session_names_begin_in_a_script() -> None:
    """Outside of a request there is no session."""

    async def get_db() -> AsyncIterator[Any]:
        yield get_session()

    with pytest.raises(NoSession, match=r"use `database.begin\(\)`"):
        await with_async_for(get_db)


@pytest.mark.parametrize("real", ["sqlite", "psycopg"], indirect=True)
async def test_a_script_may_keep_calling_commit_itself(running: Running) -> None:
    """After `set_rollback(True)`, uncommitted work is rolled back."""
    database: Any = running.database
    async with database.begin() as session:
        set_rollback(True)
        await session.execute(ENTRY.insert().values(note="committed"))
        await session.commit()
        await session.execute(ENTRY.insert().values(note="forgotten"))
    assert running.stored() == ["committed"]
