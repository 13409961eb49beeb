"""FastAPI Users: its SQLAlchemy adapter works on the session of the request."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from library import STORES, Library, library, served
from pages import Page

# Its adapter for SQLAlchemy refuses SQLAlchemy 2.1, so it is no test requirement; CI installs it
# beside the oldest SQLAlchemy.
pytest.importorskip("fastapi_users_db_sqlalchemy")
pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/fastapi-users.md")
ME = {"email": "me@example.com", "password": "correct horse"}


@pytest.fixture(params=STORES)
def page(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Library]:
    """The files of the page."""
    monkeypatch.setenv("SECRET", "of at least thirty-two bytes, says the standard")
    with library(PAGE, request.param, tmp_path) as found:
        yield found


@asynccontextmanager
async def connected(module: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a real server."""
    async with (
        served(module.app, module.database) as host,
        httpx2.AsyncClient(base_url=f"http://{host}") as client,
    ):
        yield client


async def log_in(client: httpx2.AsyncClient) -> None:
    """Send the token with each request from now on."""
    form = {"username": ME["email"], "password": ME["password"]}
    token = (await client.post("/auth/login", data=form)).json()["access_token"]
    client.headers["Authorization"] = f"Bearer {token}"


async def test_a_user_registers_and_logs_in(page: Library) -> None:
    """Each response is true: the user, the row of the hook, and each change are stored."""
    module = page.load("users")
    async with connected(module) as client:
        assert (await client.post("/auth/register", json=ME)).status_code == 201
        assert page.stored('SELECT email FROM "user"') == [ME["email"]]
        assert page.stored("SELECT text FROM greeting") == [f"Welcome, {ME['email']}"]
        assert (await client.get("/users/me")).status_code == 401
        await log_in(client)
        assert (await client.get("/users/me")).json()["email"] == ME["email"]
        other = {"email": "other@example.com"}
        assert (await client.patch("/users/me", json=other)).status_code == 200
        assert page.stored('SELECT email FROM "user"') == ["other@example.com"]


async def test_a_second_user_of_the_same_address_is_refused(page: Library) -> None:
    """Nothing of the attempt is stored."""
    module = page.load("users")
    async with connected(module) as client:
        assert (await client.post("/auth/register", json=ME)).status_code == 201
        assert (await client.post("/auth/register", json=ME)).status_code == 400
    assert len(page.stored("SELECT text FROM greeting")) == 1


@pytest.mark.parametrize(("method", "users"), [("commit", 1), ("flush", 0)])
async def test_a_hook_that_raises_rolls_back_its_own_transaction(
    page: Library, method: str, users: int
) -> None:
    """The adapter commits the user first. With `FlushingUsers`, neither row is stored."""
    module = page.load("users")

    async def fail(self: Any, user: Any, request: Any = None) -> None:
        module.get_session().add(module.Greeting(text="lost"))
        await module.get_session().flush()
        raise ValueError

    async def flushing_database() -> Any:
        return module.FlushingUsers(module.get_session(), module.User)

    module.UserManager.on_after_register = fail
    if method == "flush":
        module.app.dependency_overrides[module.user_database] = flushing_database
    async with connected(module) as client:
        assert (await client.post("/auth/register", json=ME)).status_code == 500
    assert page.stored("SELECT text FROM greeting") == []
    assert len(page.stored('SELECT email FROM "user"')) == users
