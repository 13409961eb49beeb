"""A connection that is opened, checked or closed in a cancelled task is not lost."""

from typing import Any

import pytest
from asgi import Exchange, respond
from conftest import (
    CLOSES_NEW_CONNECTIONS,
    ENTRY,
    SQLALCHEMY,
    WITH_MARIADB,
    Real,
    Running,
    becomes_true,
)
from sqlalchemy import select
from test_cancellation import WAYS, run_and_cancel

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("no_collections"),
]

KINDS = (*(each for each in WITH_MARIADB if not each.endswith("-sync")), "aiomysql")


# If aiosqlite is cancelled while it opens a file, only Python's reference count closes the file.
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "state", ["answers", "was ended by the server", "is too old", "is missing"]
)
async def test_a_checkout_cancelled_at_any_await_gives_its_place_back(
    real: Real, way: str, state: str
) -> None:
    """The pool pings its connection, replaces it, or opens one, before a request gets it."""
    if state == "is missing" and not CLOSES_NEW_CONNECTIONS:
        pytest.skip("this SQLAlchemy may leave a new connection open")
    if state == "was ended by the server" and real.is_sqlite:
        pytest.skip("SQLite has no server")
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    if state == "is too old":
        options["pool_recycle"] = 0
    elif real.is_mariadb and SQLALCHEMY == (2, 0, 40):
        pytest.skip("this SQLAlchemy cannot ping with the newest PyMySQL")
    else:
        options["pool_pre_ping"] = True

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        await respond(send)

    async with real.describe(**options) as database:
        assert isinstance(database, AsyncDatabase)
        running = Running(real, database)
        middleware = DBSessionMiddleware(app, database)
        at, reached = 0, True
        while reached:
            at += 1
            await database.ping()
            if state == "was ended by the server":
                real.kill()
            elif state == "is missing":
                await database.engine.dispose()
            reached, _ = await run_and_cancel(running, Exchange(middleware), at, way)
            await running.assert_clean()
            if not real.is_sqlite:
                await becomes_true(lambda: real.connections() <= 1)
        assert at > 2


@pytest.mark.parametrize("way", WAYS)
async def test_a_startup_cancelled_at_any_await_leaves_no_connection(real: Real, way: str) -> None:
    """The server has none either, also if the driver has not completed the connection yet."""
    if real.is_sqlite:
        pytest.skip("SQLite has no server to ask")
    if not CLOSES_NEW_CONNECTIONS:
        pytest.skip("this SQLAlchemy may leave a new connection open")
    database = real.describe()
    assert isinstance(database, AsyncDatabase)

    async def start(scope: Any, receive: Any, send: Any) -> None:
        await database.startup()

    at, reached = 0, True
    while reached:
        at += 1
        reached, outcome = await run_and_cancel(Running(real, database), Exchange(start), at, way)
        if database.is_running:
            await database.shutdown()
        await becomes_true(lambda: real.connections() == 0)
    assert outcome is None
    assert at > 5
