"""SQLModel: its own session class is the session of the request."""

from pathlib import Path

import httpx2
import pytest
from library import library, served
from pages import Page

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/sqlmodel.md")


async def test_its_session_is_the_session_of_the_request(tmp_path: Path) -> None:
    """`exec` works, what an answer says is stored, and what is refused is not."""
    with library(PAGE, "sqlite", tmp_path) as page:  # SQLModel's models are global
        module = page.load("readings")
        module.Reading.__table__.create(page.reader)
        async with (
            served(module.app, module.database) as host,
            httpx2.AsyncClient(base_url=f"http://{host}") as client,
        ):
            answer = await client.post("/readings", json={"place": "attic"})
            assert (answer.status_code, answer.json()) == (201, {"id": 1, "place": "attic"})
            assert page.stored("SELECT place FROM reading") == ["attic"]
            assert (await client.post("/readings", json={"place": "attic"})).status_code == 500
            assert (await client.get("/readings")).json() == [{"id": 1, "place": "attic"}]
        async with module.database, module.database.begin() as session:
            assert isinstance(session, module.AsyncSession)
