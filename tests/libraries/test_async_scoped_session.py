"""The boilerplate with a `ContextVar` and `async_scoped_session`, moved to this package."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from asgi import get, respond
from conftest import checked_out
from library import STORES, Library, library, served
from pages import Page
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from asgi_dbsession import AsyncDatabase, ConcurrentUse, DBSessionMiddleware, NoSession, get_session

pytestmark = pytest.mark.anyio

# What its table says is tested together with the tables of the other pages.
PAGE = Page("docs/migrate/async-scoped-session.md")
NOTES = "SELECT text FROM note"


@pytest.fixture(params=STORES)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Library]:
    """The files of the page, and their table."""
    with library(PAGE, request.param, tmp_path) as found:
        found.load("models")
        yield found


async def test_requests_at_once_have_a_session_each(page: Library) -> None:
    """Work is stored if the answer says so, and not stored if it was refused."""
    module = page.load("after")
    texts = [f"note {number}" for number in range(20)]
    async with (
        served(module.app, module.database) as host,
        httpx2.AsyncClient(base_url=f"http://{host}", timeout=60) as client,
    ):

        async def write(note: str) -> None:
            assert (await client.post("/refused")).status_code == 409
            assert (await client.post("/notes", params={"text": note})).status_code == 201
            assert note in page.stored(NOTES)

        await asyncio.gather(*map(write, texts))
        assert sorted((await client.get("/notes")).json()) == sorted(texts)
    assert page.stored(NOTES) == sorted(texts)
    assert await module.count() == len(texts)
    await module.engine.dispose()


@pytest.mark.parametrize("side", ["before", "after"])
async def test_an_inner_function_commits_the_outer_one_only_before(
    page: Library, side: str
) -> None:
    """After the migration, a failed request leaves no work of its functions."""
    module = page.load(side)
    transactional = getattr(module, "transactional", lambda function: function)

    @transactional  # type: ignore[untyped-decorator]
    async def order() -> None:
        session = module.session if side == "before" else get_session()
        session.add(module.Note(text="half"))
        await module.save("inner")
        raise ValueError

    module.app.get("/order")(order)
    assert isinstance((await get(module.app, "/order")).error, ValueError)
    assert page.stored(NOTES) == (["half", "inner"] if side == "before" else [])
    await module.engine.dispose()


@pytest.mark.parametrize(("side", "error"), [("before", LookupError), ("after", NoSession)])
async def test_outside_of_a_request_there_is_no_session(
    page: Library, side: str, error: type[Exception]
) -> None:
    """Both versions raise an error; the error of this package says what to write."""
    module = page.load(side)
    with pytest.raises(error) as raised:
        await module.save("lost")
    assert ("database.begin()" in str(raised.value)) is (side == "after")
    assert page.stored(NOTES) == []


@pytest.mark.parametrize(("side", "error"), [("before", SQLAlchemyError), ("after", ConcurrentUse)])
async def test_two_tasks_on_one_session_are_an_error(
    tmp_path: Path, side: str, error: type[Exception]
) -> None:
    """The error of this package says what to write."""
    with library(PAGE, "asyncpg", tmp_path) as page:
        page.load("models")
        module = page.load(side)
        results: list[Any] = []

        async def both() -> None:
            session = module.session if side == "before" else get_session()
            sleep = text("SELECT pg_sleep(0.1)")
            results.extend(
                await asyncio.gather(
                    session.execute(sleep), session.execute(sleep), return_exceptions=True
                )
            )

        module.app.get("/both")(both)
        await get(module.app, "/both")
        assert any(isinstance(each, error) for each in results)
        await module.engine.dispose()


async def test_a_session_class_that_routes_stays(tmp_path: Path) -> None:
    """The boilerplate's `get_bind`: writes go to one database, reads to another one."""
    with library(PAGE, "sqlite", tmp_path) as page:
        note: Any = page.load("models").Note
        urls = [f"sqlite+aiosqlite:///{tmp_path / name}.db" for name in ("library", "replica")]
        writer, reader = map(create_async_engine, urls)
        async with reader.begin() as connection:
            await connection.run_sync(note.metadata.create_all)

        class RoutingSession(Session):
            def get_bind(self, *args: Any, **kwargs: Any) -> Any:
                return (writer if self._flushing else reader).sync_engine

        async def app(scope: Any, receive: Any, send: Any) -> None:
            get_session().add(note(text="written"))
            await get_session().flush()
            found = (await get_session().scalars(select(note.text))).all()
            await respond(send, body=repr(found).encode())

        options: Any = {"sync_session_class": RoutingSession}
        database = AsyncDatabase.from_engine(writer, session_options=options)
        exchange = await get(DBSessionMiddleware(app, database))
        assert (exchange.status, exchange.body) == (200, b"[]")
        assert page.stored(NOTES) == ["written"]
        assert (checked_out(database), reader.pool.checkedin()) == (0, 1)  # type: ignore[attr-defined]
        await writer.dispose()
        await reader.dispose()
