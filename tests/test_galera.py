"""On a Galera cluster, a conflict with another node is reported at COMMIT."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import galera
import pytest
from anyio import to_thread
from asgi import Exchange, get, respond
from conftest import AnyDatabase, checked_out
from pages import Page
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, SyncDatabase

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]  # the first test starts the cluster

COUNT_UP = text("UPDATE counter SET value = value + 1")


@pytest.fixture
def others() -> list[Engine]:
    """Connections to each node without the middleware; the counter is set to zero."""
    engines = [
        create_engine(url.set(drivername="mysql+pymysql"), poolclass=NullPool)
        for url in galera.nodes()
    ]
    with engines[0].begin() as connection:
        connection.execute(text("CREATE OR REPLACE TABLE counter (id INT PRIMARY KEY, value INT)"))
        connection.execute(text("INSERT INTO counter VALUES (1, 0)"))
    return engines


@pytest.fixture(params=["asyncmy", "pymysql-sync"])
async def databases(
    request: pytest.FixtureRequest, others: list[Engine]
) -> AsyncIterator[list[AnyDatabase]]:
    """A database with its own pool for each node, checked after the test."""
    driver = request.param.removesuffix("-sync")
    kind = SyncDatabase if request.param.endswith("-sync") else AsyncDatabase
    async with AsyncExitStack() as stack:
        found: list[AnyDatabase] = [
            await stack.enter_async_context(kind(url.set(drivername=f"mysql+{driver}")))
            for url in galera.nodes()
        ]
        yield found
        assert [checked_out(each) for each in found] == [0, 0, 0]


def value(node: Engine) -> int:
    """Return the value of the counter on this node, after all commits have arrived."""
    with node.connect() as connection:
        connection.execute(text("SET SESSION wsrep_sync_wait = 1"))
        return int(connection.scalar(text("SELECT value FROM counter")) or 0)


async def count_up(database: AnyDatabase) -> None:
    """Count as a handler does, in the current request."""
    if isinstance(database, SyncDatabase):
        await to_thread.run_sync(lambda: database.get_session().execute(COUNT_UP))
    else:
        await database.get_session().execute(COUNT_UP)


@pytest.mark.parametrize("attempts", [1, 2])
async def test_a_commit_that_another_node_overtook_is_run_again(
    databases: list[AnyDatabase], others: list[Engine], attempts: int
) -> None:
    """With attempts it succeeds; without attempts the client gets an error, and nothing is lost."""
    runs, refused = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(1)
        await count_up(databases[0])
        if len(runs) == 1:
            with others[1].begin() as other:
                other.execute(COUNT_UP)
        await respond(send)

    def ask(error: Exception) -> None:
        refused.append(error)  # COMMIT itself has failed

    serving = DBSessionMiddleware(app, databases[0], attempts=attempts, on_commit_error=ask)
    exchange = await get(serving)
    if attempts == 1:
        assert "1213" in str(exchange.error)
        assert refused == [exchange.error]
        assert exchange.messages == []
    else:
        assert (exchange.status, exchange.error, refused) == (200, None, [])
    assert len(runs) == attempts
    assert [value(each) for each in others] == [attempts] * 3


async def test_increments_on_three_nodes_all_count(
    databases: list[AnyDatabase], others: list[Engine]
) -> None:
    """Each request with a conflict runs again, and every node has the right sum."""
    runs = 0

    def serving(database: AnyDatabase) -> DBSessionMiddleware:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal runs
            runs += 1
            await count_up(database)
            await respond(send)

        return DBSessionMiddleware(app, database, attempts=50)

    apps = [serving(each) for each in databases]
    exchanges: list[Exchange] = await asyncio.gather(*(get(app) for app in apps for _ in range(10)))
    assert [each.status for each in exchanges] == [200] * 30
    assert runs > 30
    assert [value(each) for each in others] == [30] * 3


async def test_a_node_that_waits_shows_what_another_node_has_committed(
    others: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The databases of the page on replicas: each read finds the write before it."""
    for number, url in enumerate(galera.nodes()[:2], 1):
        text_of_url = url.set(drivername="mysql+asyncmy").render_as_string(hide_password=False)
        monkeypatch.setenv(f"NODE_{number}_URL", text_of_url)
    page: dict[str, Any] = {}
    exec(Page("docs/how-to/replicas.md").files()["cluster.py"], page)
    async with page["writer"] as writer, page["reader"] as reader:
        for number in range(1, 101):
            async with writer.begin() as session:
                await session.execute(COUNT_UP)
            async with reader.begin(read_only=True) as session:
                found = await session.scalar(text("SELECT value FROM counter"))
                waits = await session.scalar(text("SELECT @@wsrep_sync_wait"))
            assert (found, waits) == (number, 1)
