"""The page on replicas does what it says, on a primary and two replicas that lag."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis_server
from asgi import Exchange
from pages import Page
from replicas import Cluster
from replicated_shop import Client
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool
from test_guides import Guide

from asgi_dbsession import Replicas

pytestmark = pytest.mark.anyio
PAGE = Page("docs/how-to/replicas.md")


@pytest.fixture
def guide(nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guide]:
    """A folder to import from, and the URLs of servers that lag."""
    servers = (nodes.primary, *nodes.replicas)
    for name, server in zip(("PRIMARY", "REPLICA_1", "REPLICA_2"), servers, strict=True):
        url = server.url.set(database="replicas").render_as_string(hide_password=False)
        monkeypatch.setenv(f"{name}_URL", url)
    monkeypatch.syspath_prepend(tmp_path)
    found = Guide(tmp_path)
    found.reader = create_engine(
        nodes.primary.url.set(drivername="postgresql+psycopg", database="replicas"),
        poolclass=NullPool,
    )
    notes = found.load(PAGE, "notes")
    nodes.catch_up()
    assert notes.database.replicas
    nodes.lag(1000)
    yield found
    found.close()


async def test_a_note_is_found_at_once(guide: Guide) -> None:
    """A client with a cookie finds what it has just stored."""
    notes = guide.load(PAGE, "notes")
    async with notes.database:
        client = Client(notes.app)
        number = (await client.ask("POST", "/notes", query_string=b"text=new")).body.decode()
        assert (await client.ask("GET", f"/notes/{number}")).body == b'"new"'


async def test_a_request_runs_again_if_its_replica_dies(guide: Guide, nodes: Cluster) -> None:
    """The client gets its note, although both replicas died with connections in the pool."""
    notes, steady = guide.load(PAGE, "notes"), guide.load(PAGE, "steady")
    nodes.lag(0)
    async with notes.database:
        number = (await Client(notes.app).ask("POST", "/notes", query_string=b"text=new")).body
        nodes.catch_up()
        await asyncio.gather(
            *(Client(notes.app).ask("GET", f"/notes/{number.decode()}") for _ in range(9))
        )
        for each in nodes.replicas:
            each.end()
        for _ in range(9):
            found = await Client(steady.app).ask("GET", f"/notes/{number.decode()}")
            assert (found.status, found.body) == (200, b'"new"')


async def test_the_options_on_the_page_are_taken(guide: Guide) -> None:
    """And the table says their defaults."""
    options = guide.load(PAGE, "options")
    async with options.database:
        async with options.database.begin() as session:
            await session.execute(text("SELECT 1"))
        assert options.database.position
    defaults = Replicas([])
    for name, default in (("max_lag", defaults.max_lag), ("cookie", f"`{defaults.cookie}`")):
        assert f"| `{name}` | {default} |" in PAGE.text
    assert defaults.lifetime == 4 * defaults.max_lag


async def test_a_worker_finds_what_its_message_is_about(guide: Guide) -> None:
    """In a context that has no cookie."""
    jobs = guide.load(PAGE, "jobs")
    async with jobs.database:
        await Client(jobs.app).ask("POST", "/jobs", query_string=b"text=new")
        assert await asyncio.create_task(jobs.work()) == ["new"]


@pytest.mark.skipif(not redis_server.is_installed, reason="there is no redis-server here")
async def test_a_client_without_cookies_finds_it_by_the_store(
    guide: Guide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its token names it; of two positions at once, the later one stays."""

    async def ask(app: Any, method: str, path: str, token: bytes) -> Exchange:
        exchange = Exchange(app, path, method=method)
        exchange.scope["headers"].append((b"authorization", token))
        exchange.scope["query_string"] = b"text=new"
        return await exchange.run()

    with redis_server.redis_server(tmp_path) as url:
        monkeypatch.setenv("REDIS_URL", url)
        stored = guide.load(PAGE, "stored")
        notes = guide.load(PAGE, "notes")
        stored.app.post("/notes", status_code=201)(notes.add)
        store = stored.database._replica_set.options.store
        async with stored.database:
            number = (await ask(stored.app, "POST", "/notes", b"one")).body.decode()
            found = await ask(stored.app, "GET", f"/notes/{number}", b"one")
            assert (found.status, found.body) == (200, b'"new"')
            assert b"set-cookie" not in dict(found.messages[0]["headers"])
            scope = {"headers": [(b"authorization", b"one")]}
            position = await store.load(scope)
            await store.save(scope, "00000000.0000000000000000.00000000")
            assert await store.load(scope) == position
        await store.redis.aclose()
    async with stored.database:
        found = await ask(stored.app, "GET", f"/notes/{number}", b"one")
        assert found.status == 200, "without a store, the primary is read from"
