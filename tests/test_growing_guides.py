"""The pages for growing applications do what they say: services, scripts, workers, migration."""

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from asgi import get
from conftest import ENTRY, Running, postgresql
from fastapi import Depends, FastAPI
from pages import Page
from sqlalchemy.orm import Session
from test_guides import Guide

from asgi_dbsession import Attempt, ConcurrentUse, DBSessionMiddleware
from asgi_dbsession.retry.conflicts import WatchedAttempt
from asgi_dbsession.retry.retry import log_retry

SERVICES = Page("docs/how-to/services.md")
RETRY = Page("docs/how-to/retry.md")

pytestmark = pytest.mark.anyio


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guide]:
    """A folder to import from, and `DATABASE_URL` of a PostgreSQL database."""
    url = postgresql("guides")[0].set(drivername="postgresql+asyncpg")
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = Guide(tmp_path)
    yield found
    found.close()


async def post(app: Any, path: str, content: bytes) -> Any:
    """Ask for a change."""
    return await get(app, path, method="POST", content=content)


async def test_a_service_joins_a_request_and_opens_a_unit_in_a_worker(guide: Guide) -> None:
    """What is sold out is left out whole; the rest is stored by the request or by the worker."""
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
    """The page's own route: each client gets the same row, some of them at a later attempt."""
    tags = guide.load(RETRY, "tags")
    async with tags.database:
        exchanges = await asyncio.gather(
            *(get(tags.app, "/tags/red", method="PUT") for _ in range(50))
        )
    answers = [json.loads(each.body) for each in exchanges]
    assert {each["id"] for each in answers} == set(guide.stored("SELECT id FROM tag"))
    assert any(each["attempt"] > 1 for each in answers)


async def test_a_script_adds_interest_in_transactions(
    guide: Guide, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's own script, and two of it at once."""
    guide.load(RETRY, "bank")
    monthly = guide.load(RETRY, "monthly")
    guide.execute("INSERT INTO account VALUES (1, 100), (2, 200)")
    await asyncio.gather(monthly.main(), monthly.main())
    assert guide.stored("SELECT balance FROM account ORDER BY id") == [106, 212]
    assert "1 106" in capsys.readouterr().out


def test_the_log_line_of_a_retry_on_the_page_is_what_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever looks for it finds it."""
    (line,) = RETRY.blocks("text")
    failed = WatchedAttempt(Attempt(1, 4), lambda _: False)
    failed.reason = "UniqueViolationError: …"
    with caplog.at_level(logging.INFO, "asgi_dbsession"):
        log_retry("PUT /tags/red", failed, 0.023)
    assert caplog.messages == [line.strip().replace("…", r"\u2026")]


@pytest.mark.parametrize("real", ["sqlite-sync", "psycopg-sync"], indirect=True)
async def test_a_block_in_a_dependency_with_def_and_yield_is_refused(running: Running) -> None:
    """The handler is in another thread than the block, so its work is not taken for the block's."""
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
