"""SQLAdmin: its pages and the application share one engine, each with sessions of its own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import checked_out
from library import STORES, Library, library, served
from pages import Page
from sqladmin import Admin

from asgi_dbsession import AsyncDatabase, DatabaseNotRunning

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/sqladmin.md")


@pytest.fixture(params=STORES)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Library]:
    """The files of the page."""
    with library(PAGE, request.param, tmp_path) as found:
        yield found


async def test_an_admin_page_stores_what_the_application_reads(page: Library) -> None:
    """A line is stored when the page says so, and a refused one is not."""
    module = page.load("shop")
    async with (
        served(module.app, module.database) as host,
        httpx2.AsyncClient(base_url=f"http://{host}") as client,
    ):

        async def create(text: str) -> int:
            response = await client.post("/admin/line/create", data={"text": text})
            assert checked_out(module.database) == 0
            return response.status_code

        assert await create("one") == 302
        assert page.stored("SELECT text FROM line") == ["one"]
        assert (await client.get("/lines")).json() == 1
        assert "one" in (await client.get("/admin/line/list")).text
        assert await create("one") == 400  # the line exists already
        assert (await client.get("/lines")).json() == 1


async def test_an_engine_that_is_not_there_yet_is_an_error_at_import() -> None:
    """The page makes the engine itself, because the error names `from_engine`."""
    database = AsyncDatabase("sqlite:///shop.db")
    app: Any = object()
    with pytest.raises(DatabaseNotRunning, match="from_engine"):
        Admin(app, database.engine)
