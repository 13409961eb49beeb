"""Tests that generated text is saved although the client disconnected, as the page says."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from conftest import ENTRY, AnyDatabase, Running, becomes_true, checked_out
from library import STORES, Library, library, served
from pages import Page
from several import Entry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from asgi_dbsession import DBSessionMiddleware, get_session

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/llm-streams.md")
KINDS = ("sqlite", "asyncpg", "psycopg")
INSERT = ENTRY.insert().values(note="half")


@pytest.fixture(params=STORES)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Library]:
    """The files of the page."""
    with library(PAGE, request.param, tmp_path) as found:
        yield found


async def hang_up(host: str, path: str, *, after: bytes) -> None:
    """Read a response up to some text, and reset the connection."""
    reader, writer = await asyncio.open_connection(*host.split(":"))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    await reader.readuntil(after)
    writer.transport.abort()


async def test_half_an_answer_is_saved(page: Library) -> None:
    """A complete stream is saved too, and no connection is held during the stream."""
    module = page.load("answers")
    answers = "SELECT text FROM answer"
    async with served(module.app, module.database) as host:
        await hang_up(host, "/ask", after=b"Forty-two")
        assert checked_out(module.database) == 0
        await becomes_true(lambda: bool(page.stored(answers)))
        (half,) = page.stored(answers)
        assert half.startswith("Forty-two")
        assert not half.endswith(".")
        async with httpx2.AsyncClient() as client:
            whole = (await client.get(f"http://{host}/ask")).text
        assert whole == "Forty-two is the answer."
        assert page.stored(answers) == [half, whole]
        assert page.stored("SELECT text FROM answer WHERE complete") == [whole]


async def shielded(work: Awaitable[Any]) -> None:
    with anyio.CancelScope(shield=True):
        await work


async def begin_and_add(database: Any) -> None:
    async with database.begin() as session:
        session.add(Entry(note="half"))


async def begin_and_execute(database: Any) -> None:
    async with database.begin() as session:
        await session.execute(INSERT)


async def add(database: Any) -> None:
    get_session().add(Entry(note="half"))


async def commit(database: Any) -> None:
    get_session().add(Entry(note="half"))
    await get_session().commit()


Save = Callable[[AnyDatabase], Awaitable[None]]
# The rows of the table on the page: how the text is saved, if a shield is used, and the result.
WAYS: list[tuple[Save, bool, list[str]]] = [
    (begin_and_execute, True, ["half"]),
    (begin_and_add, False, ["half"]),
    (begin_and_execute, False, []),
    (add, False, []),
    (commit, True, ["half"]),
]


@pytest.mark.parametrize("waits_for", ["the model", "the client"])
@pytest.mark.parametrize(("save", "in_shield", "stored"), WAYS)
async def test_the_table_of_the_page_is_so(
    running: Running,
    caplog: pytest.LogCaptureFixture,
    save: Save,
    *,
    in_shield: bool,
    stored: list[str],
    waits_for: str,
) -> None:
    """The client disconnects at any point of the stream; the pool is complete afterwards."""
    ended = asyncio.Event()

    async def body() -> AsyncIterator[str]:
        try:
            while True:
                yield "word" if waits_for == "the model" else "word" * 20_000
                await asyncio.sleep(60 if waits_for == "the model" else 0)
        finally:
            try:
                work = save(running.database)
                await (shielded(work) if in_shield else work)
            finally:
                ended.set()

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(body())

    app = Starlette(routes=[Route("/", stream)])
    app.add_middleware(DBSessionMiddleware, running.database)
    async with served(app, running.database) as host:
        await hang_up(host, "/", after=b"word")
        await asyncio.wait_for(ended.wait(), 10)
    gc.collect()
    assert running.stored() == stored
    cures = [each for each in caplog.messages if "async with database.begin()" in each]
    assert len(cures) == (1 if save is add else 0)


async def test_the_table_has_these_rows() -> None:
    """Each row of the table on the page is tested above."""
    rows = [line for line in PAGE.text.splitlines() if line.startswith("| `")]
    assert [row.split("|")[2].split()[0].strip(":,") for row in rows] == [
        "yes" if stored else "no" for _, _, stored in WAYS
    ]
