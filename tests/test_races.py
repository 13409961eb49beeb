"""Requests with real conflicts all succeed, and the sum of their work is right."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
import uvicorn
from anyio import to_thread
from asgi import Exchange, get, respond
from conftest import AnyDatabase, Real, becomes_true, postgresql, real_database
from pages import Page
from sqlalchemy import event, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from asgi_dbsession import DBSessionMiddleware, SyncDatabase

pytestmark = pytest.mark.anyio


class Base(DeclarativeBase):
    """The base of the mapped class."""


class Counter(Base):
    """The row that all requests increase."""

    __tablename__ = "counter"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int]


def counters(real: Real) -> dict[int, int]:
    """Return the stored numbers."""
    with real.reader.connect() as connection:
        rows = connection.execute(select(Counter.id, Counter.value))
        return {row.id: row.value for row in rows}


class Racing:
    """Two counters, a database, and an application that counts as its handler does.

    Args:
        real: The database.
        database: The same, running.
    """

    def __init__(self, real: Real, database: AnyDatabase) -> None:
        self.real = real
        self.database = database
        self.begins: str | None = None
        self.runs = 0

    def work(self, session: Session, run: int) -> None:
        """Increase the number that was read; a conflict makes the request begin again."""
        counter = session.get_one(Counter, 1)
        counter.value += 1

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        run = self.runs
        if isinstance(self.database, SyncDatabase):
            database = self.database
            await to_thread.run_sync(lambda: self.work(database.get_session(), run))
        else:
            await self.database.get_session().run_sync(self.work, run)
        await respond(send)

    async def serve(self, requests: int, **options: Any) -> list[Exchange]:
        """Serve so many requests at the same time."""
        serving = DBSessionMiddleware(self.app, self.database, **options)
        return await asyncio.gather(*(get(serving) for _ in range(requests)))


@pytest.fixture
async def racing(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Racing]:
    """A kind of database, with engine options."""
    kind, options = request.param[0], dict(request.param[1])
    begins = options.pop("begin", None)
    real = real_database(kind, tmp_path)
    Base.metadata.create_all(real.reader)
    with real.reader.begin() as connection:
        connection.execute(insert(Counter), [{"id": each, "value": 0} for each in (1, 2)])
    async with real.describe(**options) as database:
        racing = Racing(real, database)
        racing.begins = begins
        if begins is not None:
            engine = getattr(database.engine, "sync_engine", database.engine)
            event.listen(engine, "begin", lambda each: each.exec_driver_sql(f"BEGIN {begins}"))
        yield racing
        await real.assert_clean(database)
    Base.metadata.drop_all(real.reader)
    real.reader.dispose()


def on(*kinds: str, **options: Any) -> pytest.MarkDecorator:
    """Run a test with these kinds of databases and engine options."""
    return pytest.mark.parametrize(
        "racing", [(kind, options) for kind in kinds], indirect=True, ids=kinds
    )


@on("asyncpg", "psycopg-sync", isolation_level="SERIALIZABLE", max_overflow=0)
async def test_a_hundred_increments_on_postgresql_all_count(racing: Racing) -> None:
    """Under SERIALIZABLE, conflicts come at flush or COMMIT; without attempts some fail."""
    exchanges = await racing.serve(100, attempts=50)
    assert [each.status for each in exchanges] == [200] * 100
    assert counters(racing.real)[1] == 100
    assert racing.runs > 100
    refused = [each for each in await racing.serve(50) if each.error is not None]
    assert refused
    assert all(isinstance(each.error, DBAPIError) for each in refused)
    assert counters(racing.real)[1] == 150 - len(refused)


@on("asyncpg", isolation_level="SERIALIZABLE", max_overflow=0)
async def test_a_hundred_increments_over_a_real_server_all_count(racing: Racing) -> None:
    """Each client has its own connection to uvicorn, and gets a response."""
    serving = DBSessionMiddleware(racing.app, racing.database, attempts=50)
    # The database is running already; use any free port.
    config = uvicorn.Config(serving, port=0, lifespan="off", ws="none", log_level="error")
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    await becomes_true(lambda: server.started or running.done())
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        answers = await asyncio.gather(*(client.post("/") for _ in range(100)))
    server.should_exit = True
    await running
    assert [each.status_code for each in answers] == [200] * 100
    assert counters(racing.real)[1] == 100
    assert racing.runs > 100


class Crossing(Racing):
    """Two requests at a time lock the two counters in opposite order."""

    def work(self, session: Session, run: int) -> None:
        first = 1 + run % 2
        for each in (first, 3 - first):
            count_up = update(Counter).where(Counter.id == each).values(value=Counter.value + 1)
            session.execute(count_up)
            session.execute(text("SELECT SLEEP(0.02)"))  # the other request has begun by then


@on("asyncmy", "pymysql-sync")
async def test_deadlocks_on_mariadb_are_run_again(racing: Racing) -> None:
    """A request that InnoDB rolls back counts after a retry; without attempts it is refused."""
    crossing = Crossing(racing.real, racing.database)
    exchanges = await crossing.serve(6, attempts=30)
    assert [each.status for each in exchanges] == [200] * 6
    assert counters(racing.real) == {1: 6, 2: 6}
    assert crossing.runs > 6
    refused = [each for each in await crossing.serve(4) if each.error is not None]
    assert refused
    assert "1213" in str(refused[0].error)
    assert counters(racing.real) == {1: 10 - len(refused), 2: 10 - len(refused)}


def log_and_begin(mode: str | None) -> dict[str, Any]:
    """Options of SQLite: a write-ahead log, no waiting, and the kind of BEGIN."""

    def configure(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        if mode is not None:
            connection.isolation_level = None  # the driver sends no BEGIN itself

    return {"pool_events": [(configure, "connect")], "connect_args": {"timeout": 0}, "begin": mode}


ON_SQLITE = pytest.mark.parametrize(
    "racing",
    [
        (kind, log_and_begin(mode))
        for kind in ("sqlite", "sqlite-sync")
        for mode in (None, "DEFERRED", "IMMEDIATE")
    ],
    indirect=True,
    ids=lambda given: f"{given[0]}-{given[1]['begin']}",
)


class Adding(Racing):
    """Each request counts in one statement."""

    def work(self, session: Session, run: int) -> None:
        session.execute(update(Counter).values(value=Counter.value + 1))


@ON_SQLITE
async def test_a_busy_sqlite_is_asked_again(racing: Racing) -> None:
    """Transactions begin before the first write (by the driver), DEFERRED, or IMMEDIATE."""
    adding = Adding(racing.real, racing.database)
    with racing.real.reader.connect() as writer:
        writer.exec_driver_sql("BEGIN IMMEDIATE")
        (refused,) = await adding.serve(1)
        assert "database is locked" in str(refused.error)
        serving = asyncio.create_task(adding.serve(10, attempts=50))
        await becomes_true(lambda: adding.runs > 20)
        writer.rollback()
        assert [each.status for each in await serving] == [200] * 10
    assert counters(racing.real) == {1: 10, 2: 10}


class Overtaken(Racing):
    """Another transaction has changed the row that the first attempt has read."""

    def work(self, session: Session, run: int) -> None:
        counter = session.get_one(Counter, 1)
        if run == 1:
            with self.real.reader.begin() as other:
                other.execute(update(Counter).values(value=10))
        counter.value += 1


@ON_SQLITE
async def test_sqlite_sees_a_read_that_is_out_of_date_where_a_transaction_was_begun(
    racing: Racing,
) -> None:
    """With DEFERRED it is retried; the driver's BEGIN is too late, and the other write is lost."""
    overtaken = Overtaken(racing.real, racing.database)
    mode = racing.begins
    if mode == "IMMEDIATE":
        pytest.skip("nobody can write between a read and a write of this transaction")
    (exchange,) = await overtaken.serve(1, attempts=2)
    assert exchange.status == 200
    assert (overtaken.runs, counters(racing.real)[1]) == ((2, 11) if mode else (1, 1))


PAGE = Page("docs/how-to/retry.md")


async def test_the_deposits_of_the_page_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred requests run at once, and each gets a response."""
    url, reader = postgresql("tests")
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    bank = ModuleType("bank")
    monkeypatch.setitem(sys.modules, "bank", bank)  # annotations are evaluated there
    exec(compile(PAGE.blocks()[0], PAGE.path, "exec"), vars(bank))
    bank.app.user_middleware[0].kwargs["attempts"] = 50  # this machine may be slow
    bank.Base.metadata.create_all(reader)
    try:
        with reader.begin() as connection:
            connection.execute(insert(bank.Account).values(id=1, balance=0))
        async with bank.database:
            exchanges = await asyncio.gather(
                *(deposit(bank.app, amount) for amount in range(100)),
            )
        assert [each.status for each in exchanges] == [200] * 100
        with reader.connect() as connection:
            assert connection.scalar(select(bank.Account.balance)) == sum(range(100))
    finally:
        bank.Base.metadata.drop_all(reader)


async def deposit(app: Any, amount: int) -> Exchange:
    exchange = Exchange(app, "/accounts/1/deposits", method="POST")
    exchange.scope["query_string"] = f"amount={amount}".encode()
    return await exchange.run()


async def test_the_engine_of_the_page_begins_its_transactions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that another request has changed meanwhile is not overwritten."""
    monkeypatch.chdir(tmp_path)
    shop = PAGE.run(3)["shop"]
    async with shop.begin() as session:
        await session.execute(text("CREATE TABLE item (count INT)"))
        await session.execute(text("INSERT INTO item VALUES (1)"))
    with pytest.raises(DBAPIError, match="locked"):
        async with shop.begin() as session:
            await session.execute(text("SELECT count FROM item"))
            async with shop.begin() as other:
                await other.execute(text("UPDATE item SET count = 2"))
            await session.execute(text("UPDATE item SET count = 3"))
    await shop.engine.dispose()
