"""Litestar's JWT authentication loads the user on the session of the request."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from library import STORES, Library, library, served
from litestar import Litestar
from pages import Page

from asgi_dbsession import DBSessionMiddleware, NoSession

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/litestar-jwt.md")
VISITS = "SELECT visits FROM member"


@pytest.fixture(params=STORES)
def page(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Library]:
    """The files of the page."""
    monkeypatch.setenv("SECRET", "of at least thirty-two bytes, says the standard")
    with library(PAGE, request.param, tmp_path) as found:
        yield found


@asynccontextmanager
async def connected(app: Any, database: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a real server."""
    async with (
        served(app, database) as host,
        httpx2.AsyncClient(base_url=f"http://{host}") as client,
    ):
        yield client


async def join(client: httpx2.AsyncClient, name: str) -> int:
    """Register a user, and send the token from now on."""
    response = await client.post("/members", params={"name": name})
    if response.status_code == 201:
        client.headers["Authorization"] = f"Bearer {response.text}"
    return response.status_code


async def test_the_user_is_of_the_session_of_the_request(page: Library) -> None:
    """Changes of a handler on the user are stored before the answer arrives."""
    module = page.load("members")
    async with connected(module.app, module.database) as client:
        assert (await client.post("/visits")).status_code == 401
        assert await join(client, "Ada") == 201
        for visit in (1, 2):
            assert (await client.post("/visits")).text == f"Ada, visit {visit}"
            assert page.stored(VISITS) == [visit]
        assert await join(client, "Ada") == 500
        page.execute("DELETE FROM member")
        assert (await client.post("/visits")).status_code == 401


async def test_in_litestars_own_list_the_middleware_is_too_far_inside(page: Library) -> None:
    """The page wraps the application, because Litestar loads the user outside of its middleware."""
    module = page.load("members")
    errors: list[BaseException] = []

    async def retrieve(token: Any, connection: Any) -> Any:
        try:
            return await module.retrieve_member(token, connection)
        except NoSession as error:
            errors.append(error)
            raise

    module.jwt.retrieve_user_handler = retrieve
    app = Litestar(
        [module.join, module.visit],
        middleware=[lambda app: DBSessionMiddleware(app, module.database)],
        lifespan=[module.database],
        on_app_init=[module.jwt.on_app_init],
    )
    async with connected(app, module.database) as client:
        assert await join(client, "Ada") == 201
        assert (await client.post("/visits")).status_code == 500
    assert "that wraps the code" in str(errors[0])
    assert page.stored(VISITS) == [0]
