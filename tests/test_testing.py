"""Tests that work inside `rolled_back` is visible during the test, and rolled back after it."""

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from contextvars import Context
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pytest
from anyio import CancelScope
from asgi import get, respond
from conftest import (
    CHILD,
    ENTRY,
    METADATA,
    WITH_MARIADB,
    Real,
    Running,
    becomes_true,
    checked_out,
    real_database,
)
from fastapi import Depends, FastAPI
from sqlalchemy import create_engine, event, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DatabaseNotRunning,
    DatabaseUnavailable,
    DBSessionMiddleware,
    SyncDatabase,
    TransactionAborted,
    set_rollback,
)
from asgi_dbsession.testing import NotIsolated, count_statements, rolled_back

pytestmark = pytest.mark.anyio

KINDS = WITH_MARIADB


class Shop(Running):
    """An application that does with its session what the path of a request says."""

    @classmethod
    def of(cls, real: Real, **options: Any) -> "Shop":
        """An application with a real database that is not running yet."""
        return cls(real, real.describe(**options))

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        """Store the first part of the path, and answer with the second part as the status."""
        if scope["type"] == "lifespan":
            await self.live(receive, send)
            return
        note, status = scope["path"].strip("/").split("/")
        await self.write(note)
        if note == "doomed":
            await self.doom()
        await respond(send, int(status), ",".join(await self.seen()).encode())

    async def live(self, receive: Any, send: Any) -> None:
        """Start and stop the databases, as frameworks do."""
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    @property
    def app(self) -> DBSessionMiddleware:
        """The application in production form."""
        return self.around(self.serve)

    def around(self, app: Any) -> DBSessionMiddleware:
        """The application with another handler."""
        return DBSessionMiddleware(app, self.database)

    async def seen(self) -> list[str]:
        """Return the notes that the current session sees."""
        return [row.note for row in await self.execute(select(ENTRY).order_by(ENTRY.c.id))]

    async def alone(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Run a function in a unit of work of the test."""
        if isinstance(self.database, AsyncDatabase):
            async with self.database.begin():
                return await work()
        with self.database.begin():
            return await work()

    async def add(self, note: str) -> None:
        """Store a row, as a test does at its start."""
        await self.alone(lambda: self.write(note))

    async def all(self) -> list[str]:
        """Return the rows that a test sees at its end."""
        notes: list[str] = await self.alone(self.seen)
        return notes


def backend(real: Real) -> str:
    """Return the kind: `sqlite`, `postgresql`, or `mysql` for MariaDB."""
    return real.url.get_backend_name()


def slow(shop: Shop) -> Any:
    """A statement that takes long, but not where nothing can cancel it."""
    if backend(shop.real) != "sqlite":
        sleep = "pg_sleep" if backend(shop.real) == "postgresql" else "SLEEP"
        return text(f"SELECT {sleep}({0.1 if shop.real.is_sync else 3})")
    return text(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 400000) "
        "SELECT count(*) FROM n"
    )


async def finish(result: Any) -> None:
    """Await the result of an async session; a sync session is done already."""
    if inspect.isawaitable(result):
        await result


@pytest.fixture
async def shop(real: Real) -> AsyncIterator[Shop]:
    """An application on each kind of database, inside `rolled_back`; nothing stays stored."""
    with real.reader.begin() as connection:
        connection.execute(ENTRY.insert().values(note="before"))
    shop = Shop.of(real)
    async with rolled_back(shop.database):
        yield shop
        assert checked_out(shop.database) == 0
    assert real.stored() == ["before"]
    await becomes_true(lambda: real.open_transactions() == 0)


@pytest.mark.matrix("`rolled_back` in tests of an application", "real")
async def test_what_a_request_committed_is_there_for_the_test_and_for_the_next_request(
    shop: Shop,
) -> None:
    """A test sees rows that requests have stored."""
    assert (await get(shop.app, "/one/201")).body == b"before,one"
    assert (await get(shop.app, "/two/201")).body == b"before,one,two"
    assert await shop.all() == ["before", "one", "two"]


@pytest.mark.matrix("`rolled_back` in tests of an application", "real")
async def test_a_request_sees_what_the_test_has_stored(shop: Shop) -> None:
    """Requests see rows that the test has stored."""
    await shop.add("test")
    assert (await get(shop.app, "/one/201")).body == b"before,test,one"


@pytest.mark.matrix("`rolled_back` in tests of an application", "real")
async def test_a_request_sees_what_the_test_has_not_committed_yet(shop: Shop) -> None:
    """Requests see uncommitted rows of the test, and the test sees those of requests."""

    async def work() -> list[str]:
        await shop.write("test")
        assert (await get(shop.app, "/one/201")).body == b"before,test,one"
        assert (await get(shop.app, "/two/400")).body == b"before,test,one,two"
        await shop.write("more")
        return await shop.seen()

    assert await shop.alone(work) == ["before", "test", "one", "more"]
    assert await shop.all() == ["before", "test", "one", "more"]


@pytest.mark.matrix("`rolled_back` in tests of an application", "real")
async def test_a_request_that_fails_rolls_back_its_own_work_only(shop: Shop) -> None:
    """A request that fails rolls back its own work only."""
    await get(shop.app, "/one/201")
    assert (await get(shop.app, "/two/404")).body == b"before,one,two"
    exchange = await get(shop.app, "/no-status")
    assert isinstance(exchange.error, ValueError)
    assert await shop.all() == ["before", "one"]


@pytest.mark.matrix("`rolled_back` in tests of an application", "real")
async def test_a_deferred_constraint_fails_at_commit(shop: Shop) -> None:
    """A deferred constraint fails at COMMIT, and the client gets an error."""
    if backend(shop.real) == "mysql":
        pytest.skip("MariaDB has no deferred constraints")
    await get(shop.app, "/one/201")
    exchange = await get(shop.app, "/doomed/201")
    assert (exchange.status, type(exchange.error).__name__) == (None, "IntegrityError")
    assert (await get(shop.app, "/two/201")).body == b"before,one,two"


@pytest.mark.matrix("`rolled_back` in tests of an application", "real")
async def test_concurrent_requests_take_turns(shop: Shop) -> None:
    """Concurrent requests run one after the other; each commits or rolls back by its status."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await shop.write(scope["path"])
        await asyncio.sleep(0)
        await shop.write(scope["path"] + "/again")
        await respond(send, 409 if scope["path"].endswith(("3", "7")) else 200)

    paths = [f"/{number}" for number in range(10)]
    exchanges = await asyncio.gather(*(get(shop.around(serve), path) for path in paths))
    assert [each.error for each in exchanges] == [None] * 10
    expected = {path + end for path in paths if path not in ("/3", "/7") for end in ("", "/again")}
    assert set(await shop.all()) - {"before"} == expected


async def cancel_after(work: Callable[[], Awaitable[None]], way: str, turns: int) -> None:
    """Do work in a task, and cancel it after some turns of the event loop."""
    scopes: list[CancelScope] = []

    async def run() -> None:
        with CancelScope() as scope:
            scopes.append(scope)
            await work()

    task = asyncio.create_task(run())
    for _ in range(turns):
        await asyncio.sleep(0)
    if way == "anyio" and scopes:
        scopes[0].cancel()
    else:
        task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("way", ["native", "anyio"])
async def test_a_cancelled_reader_leaves_the_connection_to_writers(real: Real, way: str) -> None:
    """SQLite is told to refuse writes for one statement, and not for the rest of the test."""
    if real.kind != "sqlite":
        pytest.skip("other drivers are not told for each statement")
    database: Any = real.describe()

    async def read() -> None:
        async with database.begin(read_only=True) as session:
            for _ in range(2):
                await session.execute(select(ENTRY))

    async with database:
        for turns in range(100):
            async with rolled_back(database):
                await cancel_after(read, way, turns)
                async with database.begin() as session:
                    await session.execute(ENTRY.insert().values(note="written"))
            async with database.begin() as session:
                await session.execute(ENTRY.insert().values(note=f"after {turns}"))
    assert real.stored() == [f"after {turns}" for turns in range(100)]


@pytest.mark.parametrize("way", ["native", "anyio"])
async def test_a_cancelled_commit_does_not_look_like_the_end_of_the_test(
    real: Real, way: str
) -> None:
    """The savepoint of the transaction is released or not, and the block knows it."""
    if real.kind not in ("sqlite", "asyncpg"):
        pytest.skip("the other drivers close a connection whose statement is cancelled")
    database: Any = real.describe()

    async def commit() -> None:
        async with database.begin() as session:
            await session.execute(ENTRY.insert().values(note="committed"))
            await session.commit()
            async with session.begin_nested():
                await session.execute(select(ENTRY))

    async with database:
        for turns in range(80):
            async with rolled_back(database):
                await cancel_after(commit, way, turns)
                async with database.begin() as session:
                    await session.execute(ENTRY.insert().values(note="written"))
            assert real.stored() == []


@pytest.mark.matrix("`rolled_back` in tests of an application", "real")
async def test_a_request_that_is_cancelled_leaves_the_connection_to_the_others(shop: Shop) -> None:
    """A request that is cancelled in the middle of a statement rolls back its own work only."""
    await get(shop.app, "/one/201")

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await shop.write("cancelled")
        await shop.execute(slow(shop))

    request = asyncio.ensure_future(get(shop.around(serve)))
    with count_statements(shop.database) as statements:
        await becomes_true(lambda: len(statements) == 2)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    exchange = await get(shop.app, "/two/201")
    # They close the connection of a cancelled statement.
    if shop.real.kind in ("asyncmy", "aiomysql"):
        assert "The connection was lost" in str(exchange.error)
        return
    assert exchange.body == b"before,one,two"


@pytest.mark.matrix("`rolled_back` in tests of an application", "real")
async def test_a_savepoint_of_the_application_is_its_own(shop: Shop) -> None:
    """Savepoints of the application work as usual."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await shop.write("outer")
        savepoint = await shop.call("begin_nested")
        await shop.write("inner")
        await finish(savepoint.rollback())
        await respond(send)

    exchange = await get(shop.around(serve))
    assert exchange.error is None
    assert await shop.all() == ["before", "outer"]


async def test_a_unit_of_work_inside_a_request_survives_its_rollback(shop: Shop) -> None:
    """This holds if the request has only read; `begin()` is made for such rows."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await shop.seen()
        await shop.add("audit")
        assert await shop.seen() == ["before", "audit"]
        await shop.write("lost")
        await respond(send, 401)

    exchange = await get(shop.around(serve))
    assert (exchange.status, exchange.error) == (401, None)
    assert await shop.all() == ["before", "audit"]


async def test_a_unit_of_work_inside_a_request_may_follow_a_failed_statement(shop: Shop) -> None:
    """The error aborts the transaction of the request, and no other."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await shop.write("lost")
        try:
            await shop.write("before")
        except IntegrityError:
            await shop.add("audit")
        await respond(send, 500 if backend(shop.real) == "postgresql" else 200)

    exchange = await get(shop.around(serve))
    assert exchange.error is None
    if backend(shop.real) == "postgresql":
        assert await shop.all() == ["before", "audit"]
    else:
        assert await shop.all() == ["before", "lost", "audit"]


async def test_an_error_that_was_swallowed_is_still_found_out(shop: Shop) -> None:
    """`TransactionAborted` is raised if the database aborts a transaction at an error."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await shop.write("lost")
        try:
            await shop.write("before")
        except IntegrityError:
            if scope["path"] == "/audited":
                await shop.add("audit")
        await respond(send)

    for path in ("/", "/audited"):
        exchange = await get(shop.around(serve), path)
        if backend(shop.real) == "postgresql":
            assert isinstance(exchange.error, TransactionAborted)
        else:
            assert exchange.error is None
            break


async def test_what_one_connection_cannot_show_is_an_error_in_the_end(real: Real) -> None:
    """The rollback would also remove work that `begin()` has committed, so an error is raised."""
    shop = Shop.of(real)

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await shop.write("lost")
        await shop.add("audit")
        await respond(send, 401)

    with pytest.raises(NotIsolated, match="without `rolled_back`") as caught:
        async with rolled_back(shop.database):
            await get(shop.around(serve), "/login")
    assert "the transaction of GET /login" in str(caught.value)
    with pytest.raises(AssertionError, match="of the test") as failed:
        async with rolled_back(shop.database):
            await get(shop.around(serve), "/login")
            raise AssertionError("of the test")
    assert "GET /login" in "".join(failed.value.__notes__)
    assert real.stored() == []


ONE = "SELECT 1 AS one"
READS = (f"WITH few AS ({ONE}) {ONE} FROM few", f"/* why */ {ONE}", f"-- why\n{ONE}", f" ({ONE})")


@pytest.mark.parametrize("read", READS)
async def test_a_read_in_a_unit_of_its_own_may_be_rolled_back(real: Real, read: str) -> None:
    """Nothing was committed, whatever the first word of the statement is."""
    if read.startswith(" (") and backend(real) == "sqlite":
        pytest.skip("SQLite does not know brackets here")
    shop = Shop.of(real)

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await shop.write("lost")
        await shop.alone(lambda: shop.execute(text(read)))
        await respond(send, 401)

    async with rolled_back(shop.database):
        assert (await get(shop.around(serve))).status == 401
        assert await shop.all() == []


async def test_a_savepoint_in_a_unit_of_its_own_that_only_reads_may_be_rolled_back(
    real: Real,
) -> None:
    """The savepoint stores nothing. It lasts while another unit is open inside of it."""
    shop = Shop.of(real)
    database: Any = shop.database

    async def read_twice() -> None:
        async with savepoint(database.get_session()):
            await shop.seen()
            await shop.alone(shop.seen)

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await shop.write("lost")
        await shop.alone(read_twice)
        await respond(send, 401)

    async with rolled_back(database):
        assert (await get(shop.around(serve))).status == 401
        assert await shop.all() == []


@asynccontextmanager
async def savepoint(session: Any) -> AsyncIterator[None]:
    """`session.begin_nested()`, whatever the kind of the session."""
    if isinstance(session, Session):
        with session.begin_nested():
            yield
    else:
        async with session.begin_nested():
            yield


@pytest.mark.parametrize(
    "write",
    [
        f"WITH few AS ({ONE}) INSERT INTO entry (note) SELECT 'kept' FROM few",
        "/* why */ INSERT INTO entry (note) SELECT 'kept'",
    ],
)
@pytest.mark.parametrize("real", ["sqlite", "sqlite-sync", "asyncpg"], indirect=True)
async def test_a_write_in_a_unit_of_its_own_may_not_be_rolled_back(real: Real, write: str) -> None:
    """In production it would stay, also if its first word is none of a write."""
    shop = Shop.of(real)

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await shop.write("lost")
        await shop.alone(lambda: shop.execute(text(write)))
        await respond(send, 401)

    with pytest.raises(NotIsolated, match="it would have stayed"):
        async with rolled_back(shop.database):
            await get(shop.around(serve))


async def test_requests_that_wait_for_each_other_get_a_clear_error(real: Real) -> None:
    """The error names the request that it waited for."""
    shop = Shop.of(real)
    both = asyncio.Barrier(2)

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/second":
            await both.wait()
        await shop.write(scope["path"])
        if scope["path"] == "/first":
            await both.wait()
            await stuck
        await respond(send)

    async with rolled_back(shop.database, timeout=0.1):
        app = shop.around(serve)
        stuck = asyncio.get_running_loop().create_future()
        first = asyncio.ensure_future(get(app, "/first"))
        second = await get(app, "/second")
        assert isinstance(second.error, NotIsolated)
        assert "the transaction of GET /second has waited for" in str(second.error)
        assert "the transaction of GET /first to end" in str(second.error)
        stuck.set_result(None)
        assert (await first).error is None
        assert await shop.all() == ["/first"]


async def test_work_on_a_transaction_around_another_one_is_refused(real: Real) -> None:
    """The statement would be part of the inner transaction, so an error is raised at once."""
    shop = Shop.of(real)
    database = shop.database
    if not isinstance(database, AsyncDatabase):
        pytest.skip("a matter of the order alone")

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        outer = database.get_session()
        await shop.write("outer")
        async with database.begin():
            await shop.write("inner")
            await outer.execute(select(ENTRY))

    async with rolled_back(shop.database):
        exchange = await get(shop.around(serve))
        assert isinstance(exchange.error, NotIsolated)
        assert "which began inside of it, is still open" in str(exchange.error)
        assert await shop.all() == []


async def test_a_connection_that_is_lost_is_not_replaced_by_an_empty_one(real: Real) -> None:
    """All work is lost, so each later use raises an error."""
    if backend(real) != "postgresql":
        pytest.skip("shown on PostgreSQL")
    shop = Shop.of(real)
    async with rolled_back(shop.database):
        await shop.add("one")
        with real.reader.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        assert (await get(shop.app, "/two/201")).error is not None
        exchange = await get(shop.app, "/three/201")
        assert isinstance(exchange.error, NotIsolated)
        assert "The connection was lost" in str(exchange.error)
    async with rolled_back(shop.database):
        assert await shop.all() == []


async def test_a_statement_that_commits_by_itself_is_found_out(real: Real) -> None:
    """MariaDB commits at CREATE TABLE: nothing can be rolled back, and the error says so."""
    if backend(real) != "mysql":
        pytest.skip("a matter of MariaDB")
    shop = Shop.of(real)

    async def create() -> None:
        await shop.execute(text("CREATE OR REPLACE TABLE surprise (id INT)"))

    with pytest.raises(NotIsolated, match="CREATE TABLE, TRUNCATE"):
        async with rolled_back(shop.database):
            with pytest.raises(NotIsolated, match="CREATE TABLE, TRUNCATE"):
                await shop.alone(create)
            with pytest.raises(NotIsolated, match="The outer transaction of the test has ended"):
                await shop.all()
    with real.reader.begin() as connection:
        connection.exec_driver_sql("DROP TABLE surprise")


async def commit_on_the_driver(shop: Shop, note: str) -> None:
    """Store a row past SQLAlchemy, on a connection that `engine.raw_connection()` returns."""
    engine: Any = shop.database.engine

    def store(_: object = None) -> None:
        raw = getattr(engine, "sync_engine", engine).raw_connection()
        cursor = raw.cursor()
        cursor.execute(f"INSERT INTO entry (note) VALUES ('{note}')")
        cursor.close()
        raw.commit()
        raw.close()

    if shop.real.is_sync:
        store()
    else:
        async with engine.connect() as connection:
            await connection.run_sync(store)


async def commit_below_the_session(shop: Shop, note: str) -> None:
    """Store a row, and call `commit()` of the driver's connection of the session."""

    def commit(session: Session) -> None:
        driver: Any = session.connection().connection.dbapi_connection
        driver.commit()

    await shop.write(note)
    session: Any = shop.database.get_session()
    if shop.real.is_sync:
        commit(session)
    else:
        await session.run_sync(commit)


async def commit_with_text(shop: Shop, note: str) -> None:
    """Store a row, and send COMMIT as SQL text."""
    await shop.write(note)
    await shop.execute(text("COMMIT"))


@pytest.mark.parametrize(
    "commit", [commit_on_the_driver, commit_below_the_session, commit_with_text]
)
@pytest.mark.parametrize("then", ["nothing", "another request"])
async def test_a_commit_past_sqlalchemy_is_found_out(real: Real, commit: Any, then: str) -> None:
    """What was committed cannot be rolled back, so the test fails, whatever the request says."""
    shop = Shop.of(real)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await commit(shop, "stored")
        await respond(send, 201)

    with pytest.raises(NotIsolated, match="The outer transaction of the test has ended"):
        async with rolled_back(shop.database):
            await get(shop.around(app))
            if then == "another request":
                await get(shop.app, "/more/201")
    assert real.stored() == ["stored"]
    await becomes_true(lambda: real.open_transactions() == 0)
    with real.reader.begin() as connection:
        connection.execute(ENTRY.delete())
    async with rolled_back(shop.database):
        await get(shop.app, "/next/201")
        assert await shop.all() == ["next"]
    assert real.stored() == []


async def test_a_transaction_that_sqlite_rolled_back_is_found_out(real: Real) -> None:
    """`INSERT OR ROLLBACK` also undoes what the test has done before the request."""
    if backend(real) != "sqlite":
        pytest.skip("SQLite only")
    shop = Shop.of(real)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await shop.execute(text("INSERT OR ROLLBACK INTO entry (note) VALUES ('first')"))
        await respond(send, 201)

    with pytest.raises(NotIsolated, match="SQLite rolls back"):
        async with rolled_back(shop.database):
            await shop.add("first")
            exchange = await get(shop.around(app))
            assert exchange.error is not None
    assert real.stored() == []


def test_a_commit_on_the_driver_is_found_out_in_a_test_without_a_loop(real: Real) -> None:
    """`with rolled_back(…)` does the same."""
    if not real.is_sync:
        pytest.skip("an async one belongs to an event loop")
    shop = Shop.of(real)
    with (
        pytest.raises(NotIsolated, match="The outer transaction of the test has ended"),
        rolled_back(shop.database),
    ):
        asyncio.run(commit_on_the_driver(shop, "stored"))
    assert real.stored() == ["stored"]


async def test_after_a_commit_each_constraint_is_as_its_table_declares_it(real: Real) -> None:
    """Each constraint has its declared mode again, after any change of the mode."""
    if backend(real) != "postgresql":
        pytest.skip("a matter of PostgreSQL's SET CONSTRAINTS")
    shop = Shop.of(real)

    async def run(*statements: str) -> None:
        for statement in statements:
            await shop.execute(text(statement))

    async def violate() -> None:
        with pytest.raises(IntegrityError):
            await run("INSERT INTO c VALUES (2)")
        set_rollback(True)

    deferred = ("INSERT INTO c VALUES (1)", "INSERT INTO p VALUES (1)")
    child_first = (
        "INSERT INTO child (entry_id) VALUES (7)",
        "INSERT INTO entry (id, note) VALUES (7, 'late')",
    )
    async with rolled_back(shop.database):
        for statements in (
            (
                "CREATE TABLE p (id INT PRIMARY KEY)",
                "CREATE TABLE c (id INT REFERENCES p DEFERRABLE)",
            ),
            ("SET CONSTRAINTS ALL DEFERRED", *deferred),
            child_first,
        ):
            await shop.alone(partial(run, *statements))
        await shop.alone(violate)
        assert await shop.all() == ["late"]


async def test_what_was_broken_before_is_no_matter(real: Real) -> None:
    """COMMIT checks only the rows that a transaction has changed."""
    if backend(real) != "sqlite":
        pytest.skip("SQLite only")
    with real.reader.begin() as connection:  # foreign keys are not enforced there
        connection.execute(CHILD.insert().values(entry_id=-5))
    shop = Shop.of(real)
    async with rolled_back(shop.database):
        assert (await get(shop.app, "/one/201")).error is None
        assert isinstance((await get(shop.app, "/doomed/201")).error, IntegrityError)


async def test_a_running_engine_gets_its_own_connections_back(real: Real) -> None:
    """An engine of the application works too, with its listeners and a database in memory."""
    shop = Shop.of(real)
    async with shop.database as database:
        pool, dialect = database.engine.pool, type(database.engine.dialect)
        await shop.add("real")
        engine: Any = database.engine
        other: Any = type(database).from_engine(engine)
        for each in (database, other):
            for _ in range(2):
                async with rolled_back(each):
                    assert (
                        await get(DBSessionMiddleware(shop.serve, database), "/one/201")
                    ).error is None
                    assert await shop.all() == ["real", "one"]
        async with rolled_back(database, other):
            await shop.add("one")
        assert (database.engine.pool, type(database.engine.dialect)) == (pool, dialect)
        await shop.add("really")
        assert checked_out(database) == 0
    assert real.stored() == ["real", "really"]


async def test_what_lies_in_memory_is_still_there(real: Real) -> None:
    """A separate connection would see an empty database."""
    if backend(real) != "sqlite":
        pytest.skip("SQLite only")
    database_class = SyncDatabase if real.is_sync else AsyncDatabase
    shop = Shop(real, database_class("sqlite://"))
    async with shop.database as database:
        await shop.alone(lambda: shop.execute(CreateTable(ENTRY)))
        await shop.add("kept")
        async with rolled_back(database):
            await shop.add("lost")
            assert await shop.all() == ["kept", "lost"]
        assert await shop.all() == ["kept"]


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "SERIALIZABLE"])
async def test_an_isolation_level_does_not_let_anything_through(real: Real, level: str) -> None:
    """The isolation level of an engine or a transaction is ignored."""
    for options in ({"isolation_level": level}, {"execution_options": {"isolation_level": level}}):
        shop = Shop.of(real, **options)
        async with shop.database, rolled_back(shop.database):
            await shop.alone(partial(write_at, shop, level))
            assert await shop.all() == ["one"]
        assert real.stored() == []


async def write_at(shop: Shop, level: str) -> None:
    """Store a row at an isolation level, at the start of a transaction."""
    await shop.call("connection", None, {"isolation_level": level})
    await shop.write("one")


async def test_sqlalchemys_recipe_for_sqlite_works(real: Real) -> None:
    """This recipe sends its own BEGIN, because older versions of pysqlite did not."""
    if backend(real) != "sqlite":
        pytest.skip("SQLite only")
    shop = Shop.of(real)

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    async with shop.database as database, rolled_back(database):
        engine: Any = getattr(database.engine, "sync_engine", database.engine)
        event.listen(engine, "begin", begin)
        await get(shop.app, "/one/201")
        assert (await get(shop.app, "/two/404")).error is None
        assert await shop.all() == ["one"]
    assert real.stored() == []


async def test_several_databases_are_all_rolled_back(tmp_path: Path) -> None:
    """Async and sync databases work together; if one cannot start, none stays shared."""
    reals = [real_database(kind, tmp_path) for kind in ("asyncpg", "sqlite-sync")]
    shops = [Shop.of(real) for real in reals]
    async with rolled_back(*(shop.database for shop in shops)):
        for shop in shops:
            await shop.add("one")
            assert await shop.all() == ["one"]
    assert [shop.real.stored() for shop in shops] == [[], []]
    broken = AsyncDatabase(f"sqlite:///{tmp_path}/none/none.db")
    with pytest.raises(DatabaseUnavailable):
        async with rolled_back(shops[0].database, broken):
            pass
    async with shops[0].database:
        await shops[0].add("one")
    assert shops[0].stored() == ["one"]
    for real in reals:
        real.reader.dispose()


async def test_a_database_that_is_left_out_is_not_rolled_back(tmp_path: Path) -> None:
    """The testing page says to name every database of the application."""
    reals = [real_database(kind, tmp_path) for kind in ("asyncpg", "sqlite")]
    named, forgotten = (Shop.of(real) for real in reals)

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await named.write("named")
        await forgotten.write("forgotten")
        await respond(send)

    async with rolled_back(named.database), forgotten.database:
        app = DBSessionMiddleware(serve, named.database, forgotten.database)
        assert (await get(app)).error is None
    assert [each.stored() for each in (named, forgotten)] == [[], ["forgotten"]]
    for real in reals:
        real.reader.dispose()


@pytest.mark.parametrize("real", ["sqlite"], indirect=True)
@pytest.mark.parametrize("is_rolled_back", [False, True])
async def test_a_second_writer_of_one_request_is_seen_without_rolled_back_only(
    real: Real, is_rolled_back: bool
) -> None:
    """SQLite has one writer, and retries do not help a request that waits for itself."""
    shop = Shop.of(real, connect_args={"timeout": 0.1})
    runs = []

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        runs.append(scope)
        await shop.write("of the request")
        await shop.add("of the block")
        await respond(send)

    async with rolled_back(shop.database) if is_rolled_back else shop.database:
        exchange = await get(DBSessionMiddleware(serve, shop.database, attempts=2))
    if is_rolled_back:
        assert (exchange.status, exchange.error, len(runs)) == (200, None, 1)
    else:
        assert "database is locked" in str(exchange.error)
        assert len(runs) == 2
    assert real.stored() == []


@pytest.mark.parametrize("helper", [rolled_back, count_statements])
def test_what_is_not_a_database_is_an_error(helper: Any) -> None:
    """Without a database, nothing would be rolled back, and a test would leave its rows."""
    for given, name in ((), "nothing"), (("sqlite:///shop.db",), "something of type str"):
        with pytest.raises(ConfigurationError, match=f"and was given {name}"), helper(*given):
            pass


@pytest.mark.parametrize("wrong", [-1, "10", True, float("nan")], ids=repr)
async def test_a_number_that_is_none_is_an_error(wrong: Any) -> None:
    """The error comes before the test runs, not after it or in the middle."""
    database = AsyncDatabase("sqlite://")
    with pytest.raises(ConfigurationError, match="timeout takes a number of seconds, 0 or more"):
        rolled_back(database, timeout=wrong)
    async with database:
        with (
            pytest.raises(ConfigurationError, match="at_most takes a whole number, 0 or more"),
            count_statements(database, at_most=wrong),
        ):
            pytest.fail("it went on")


async def test_using_it_in_the_wrong_place_is_an_error(real: Real) -> None:
    """The error says what to write."""
    shop = Shop.of(real)
    with (
        pytest.raises(ConfigurationError, match="`async with rolled_back"),
        rolled_back(shop.database),
    ):
        pass
    async with rolled_back(shop.database):
        with pytest.raises(ConfigurationError, match="once for each test"):
            async with rolled_back(shop.database):
                pass
        await shop.add("one")
    assert real.stored() == []


def client_for(shop: Shop, framework: str) -> TestClient:
    """A client of an application with handlers of each framework."""
    database = shop.database
    app: Starlette
    if framework == "FastAPI":
        app = api = FastAPI()
        if isinstance(database, SyncDatabase):

            @api.post("/{note}")
            def add(
                note: str, session: Annotated[Any, Depends(database.session_dependency)]
            ) -> int:
                session.execute(ENTRY.insert().values(note=note))
                return len(session.execute(select(ENTRY)).all())

        else:

            @api.post("/{note}")
            async def add_async(
                note: str, session: Annotated[Any, Depends(database.session_dependency)]
            ) -> int:
                await session.execute(ENTRY.insert().values(note=note))
                return len((await session.execute(select(ENTRY))).all())

    else:

        async def handle(request: Request) -> Response:
            await shop.write(request.path_params["note"])
            task = BackgroundTask(shop.write, f"after {request.path_params['note']}")
            return PlainTextResponse(str(len(await shop.seen())), background=task)

        app = Starlette(routes=[Route("/{note}", handle, methods=["POST"])])
    app.add_middleware(DBSessionMiddleware, database)
    return TestClient(app)


@pytest.mark.parametrize("framework", ["Starlette", "FastAPI"])
@pytest.mark.parametrize("order", ["around the client", "inside of the client"])
def test_the_test_client_runs_the_application_elsewhere(
    real: Real, framework: str, order: str
) -> None:
    """The session is in another thread and event loop, and lives as long as the test."""
    shop = Shop.of(real)
    for _ in range(2):
        client = client_for(shop, framework)
        rollback = rolled_back(shop.database)
        contexts: list[Any] = (
            [rollback, client] if order == "around the client" else [client, rollback]
        )
        with contexts[0], contexts[1]:
            assert client.portal is not None
            client.portal.call(shop.add, "test")
            assert client.post("/one").text == "2"
            expected = ["test", "one"] + ["after one"] * (framework == "Starlette")
            assert client.portal.call(shop.all) == expected
            if isinstance(shop.database, SyncDatabase):
                with shop.database.begin() as session:
                    session.execute(ENTRY.insert().values(note="mine"))
                    assert client.post("/two").text == str(len(expected) + 2)
                    assert session.scalars(select(ENTRY.c.note)).all()[-1] in ("two", "after two")
        assert not shop.database.is_running
        assert real.stored() == []


def test_a_sync_database_needs_no_client_at_all(real: Real) -> None:
    """`rolled_back` starts the database if nothing else starts it."""
    shop = Shop.of(real)
    database = shop.database
    if not isinstance(database, SyncDatabase):
        pytest.skip("an async one belongs to an event loop")
    with rolled_back(database):
        with database.begin() as session:
            session.execute(ENTRY.insert().values(note="one"))
        with database.begin() as session:
            assert session.scalars(select(ENTRY.c.note)).all() == ["one"]
    assert not database.is_running
    assert real.stored() == []


async def test_a_stream_goes_on_in_a_transaction_of_its_own(shop: Shop) -> None:
    """The background task is committed at its end, and rolled back if it fails."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await shop.write(scope["path"] + "start")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        await shop.write(scope["path"] + "body")
        if scope["path"] == "/broken/":
            raise ValueError
        await send({"type": "http.response.body", "body": b"2"})

    await get(shop.around(serve), "/whole/")
    await get(shop.around(serve), "/broken/")
    assert await shop.all() == ["before", "/whole/start", "/whole/body", "/broken/start"]


async def test_two_phases_are_as_good_as_one(real: Real) -> None:
    """A COMMIT that PREPARE would refuse is refused; no transaction stays prepared."""
    if backend(real) != "postgresql" or real.kind == "asyncpg":
        pytest.skip("the driver knows no two phases")
    shop = Shop.of(real, session_options={"twophase": True})
    async with rolled_back(shop.database):
        await get(shop.app, "/one/201")
        assert isinstance((await get(shop.app, "/doomed/201")).error, IntegrityError)
        assert (await get(shop.app, "/two/201")).body == b"one,two"
    assert real.stored() == []


async def test_the_first_of_two_phases_refuses_what_the_second_could_not(real: Real) -> None:
    """The other databases can still be rolled back."""
    if real.kind != "psycopg-sync":
        pytest.skip("an async session cannot be prepared by itself")
    shop = Shop.of(real, session_options={"twophase": True})

    async def work() -> None:
        await shop.doom()
        with pytest.raises(IntegrityError):
            await shop.call("prepare")
        set_rollback(True)

    async with rolled_back(shop.database):
        await shop.alone(work)


class There(DeclarativeBase):
    """The base of a table in another database."""


class Far(There):
    """A table in the second database."""

    __tablename__ = "entry"
    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str]


def elsewhere(real: Real, folder: Path, how: str) -> tuple[Shop, Any, Callable[[], list[str]]]:
    """A shop with a second engine for one table, this engine, and its rows."""
    file = folder / "elsewhere.db"
    reader = create_engine(f"sqlite:///{file}", poolclass=NullPool)
    METADATA.create_all(reader)

    def stored() -> list[str]:
        with reader.connect() as connection:
            return list(connection.scalars(select(ENTRY.c.note).order_by(ENTRY.c.id)))

    engine: Any = (
        create_engine(f"sqlite:///{file}")
        if real.is_sync
        else create_async_engine(f"sqlite+aiosqlite:///{file}")
    )
    bound = getattr(engine, "sync_engine", engine)

    class Routing(Session):
        def get_bind(self, mapper: Any = None, **options: Any) -> Any:
            if mapper is not None and mapper.class_ is Far:
                return bound.execution_options(copied=True)
            return super().get_bind(mapper, **options)

    options: dict[str, Any] = (
        {"binds": {Far: engine}}
        if how == "binds"
        else {"class_" if real.is_sync else "sync_session_class": Routing}
    )
    return Shop.of(real, session_options=options), engine, stored


async def write_far(shop: Shop, note: str = "far") -> None:
    """Store a row in the second engine's database."""
    await shop.execute(insert(Far).values(note=note))


SECOND = pytest.mark.parametrize("real", ["sqlite", "asyncpg", "psycopg-sync"], indirect=True)


@SECOND
async def test_the_engines_in_binds_are_rolled_back_too(real: Real, tmp_path: Path) -> None:
    """The committed row is there until the end of the test; two tests run one after the other."""
    shop, engine, stored = elsewhere(real, tmp_path, "binds")
    for _ in range(2):
        async with rolled_back(shop.database):
            with count_statements(shop.database) as statements:
                await shop.alone(partial(write_far, shop))
                await shop.add("near")
            assert len(statements) == 2
            found = await shop.alone(partial(shop.execute, select(Far.note)))
            assert found.scalars().all() == ["far"]
        assert (stored(), real.stored()) == ([], [])
    async with shop.database:
        await shop.alone(partial(write_far, shop, "kept"))
    assert stored() == ["kept"]
    await finish(engine.dispose())


@SECOND
async def test_an_engine_that_a_session_chooses_is_refused(real: Real, tmp_path: Path) -> None:
    """Nothing is stored there, even if the application catches the error; the advice works."""
    shop, engine, stored = elsewhere(real, tmp_path, "get_bind")

    async def swallow() -> None:
        for _ in range(2):
            with pytest.raises(NotIsolated, match=r"Database\.from_engine\(engine\)"):
                await write_far(shop)

    async def run() -> None:
        with pytest.raises(NotIsolated):
            await shop.alone(swallow)

    with pytest.raises(NotIsolated, match="which no `rolled_back` covers"):
        async with rolled_back(shop.database):
            await run()
    assert stored() == []
    other: Any = type(shop.database).from_engine(engine)
    async with rolled_back(shop.database, other):
        with count_statements(shop.database) as statements:
            await shop.alone(partial(write_far, shop))
        assert len(statements) == 1
    assert stored() == []
    await finish(engine.dispose())


class Job:
    """Work of the application in two parts, which continues after a test."""

    def __init__(self, shop: Shop, how: str) -> None:
        self.shop = shop
        self.how = how
        self.is_in_the_middle = False
        self.go_on = threading.Event()

    async def run(self) -> None:
        """Do the work in this way."""
        shop = self.shop
        if self.how == "several transactions":
            await shop.alone(partial(shop.write, "first"))
            await self.pause()
            await shop.alone(partial(shop.write, "late"))
        elif self.how == "begins later":
            await self.pause()
            await shop.alone(partial(shop.write, "late"))
        else:
            await shop.alone(self.one_unit)

    async def one_unit(self) -> None:
        """Do both parts in one unit of work."""
        await self.shop.write("first")
        if self.how == "one session":
            await self.shop.call("commit")
        await self.pause()
        await self.shop.write("late")

    async def pause(self) -> None:
        """Wait for the end of the test."""
        self.is_in_the_middle = True
        while not self.go_on.is_set():
            await asyncio.sleep(0.01)


HOWS = ("one transaction", "one session", "several transactions", "begins later")


@pytest.mark.parametrize("is_task", [True, False], ids=["task", "thread"])
@pytest.mark.parametrize("how", HOWS)
async def test_what_outlives_a_test_stores_nothing(real: Real, how: str, is_task: bool) -> None:
    """The work gets an error that names the reason, with or without a later test."""
    if not is_task and not real.is_sync:
        pytest.skip("an async session belongs to one event loop")
    shop = Shop.of(real)
    async with shop.database:
        for between in (False, True):
            job = Job(shop, how)
            async with rolled_back(shop.database):
                if is_task:
                    running: Any = asyncio.create_task(job.run())
                else:
                    running = begin_thread(job)
                await becomes_true(partial(getattr, job, "is_in_the_middle"))
            if between:
                async with rolled_back(shop.database):
                    await shop.add("of the next test")
            job.go_on.set()
            with pytest.raises(NotIsolated, match=r"outlived its test.*cancel and await tasks"):
                await asyncio.wait_for(asyncio.wrap_future(running) if not is_task else running, 10)
            await shop.add(f"real {between}")
        assert checked_out(shop.database) == 0
    assert real.stored() == ["real False", "real True"]


def begin_thread(job: Job) -> Any:
    """Do the work in a new thread without the context of the test, as schedulers do."""
    result: Any = Future()
    database: Any = job.shop.database

    def write(*notes: str) -> None:
        with database.begin() as session:
            for note in notes:
                if note == "late":
                    wait()
                session.execute(insert(ENTRY).values(note=note))
                if job.how == "one session":
                    session.commit()

    def wait() -> None:
        job.is_in_the_middle = True
        job.go_on.wait(10)

    def work() -> None:
        try:
            if job.how == "several transactions":
                write("first")
            if job.how in ("several transactions", "begins later"):
                wait()
                write("late")
            else:
                write("first", "late")
            result.set_result(None)
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work).start()
    return result


@pytest.mark.parametrize("real", ["sqlite-sync", "psycopg-sync"], indirect=True)
@pytest.mark.parametrize("way", ["asyncio.to_thread", "an executor", "a thread"])
def test_a_later_test_without_a_block_may_use_new_threads(real: Real, way: str) -> None:
    """Nothing of the earlier test is running, so these threads are of the later test."""
    shop: Any = Shop.of(real)

    def write() -> None:
        with shop.database.begin() as session:
            session.execute(insert(ENTRY).values(note=way))

    async def rolled_back_test() -> None:
        async with rolled_back(shop.database):
            await asyncio.to_thread(write)

    async def later_test() -> None:
        async with shop.database:
            if way == "asyncio.to_thread":
                await asyncio.to_thread(write)
            elif way == "an executor":
                await asyncio.get_running_loop().run_in_executor(None, write)
            else:
                threading.Thread(target=write).start()
                await becomes_true(lambda: bool(real.stored()))

    for test in (rolled_back_test, later_test):
        Context().run(asyncio.run, test())
    assert real.stored() == [way]


async def test_a_connection_that_outlives_a_test_is_cut_off(real: Real) -> None:
    """A connection of the engine and direct use of the driver raise the error too."""
    shop = Shop.of(real)
    async with shop.database as database:
        engine: Any = database.engine
        async with rolled_back(database):
            connection = engine.connect()
            connection = connection if real.is_sync else await connection
            await finish(connection.execute(insert(ENTRY).values(note="lost")))
        for work in (
            lambda: connection.execute(insert(ENTRY).values(note="late")),
            lambda: connection.execute(insert(ENTRY), [{"note": "a"}, {"note": "b"}]),
            lambda: connection.exec_driver_sql("INSERT INTO entry (note) VALUES ('late')"),
            connection.commit,
        ):
            with pytest.raises(NotIsolated, match="outlived its test"):
                await finish(work())
        raw: Any = connection.connection if real.is_sync else connection.sync_connection.connection
        with pytest.raises(NotIsolated, match="outlived its test"):
            raw.cursor().execute("INSERT INTO entry (note) VALUES ('late')")
        await finish(connection.rollback())
        await finish(connection.close())
        await shop.add("real")
        async with rolled_back(database):
            assert await shop.all() == ["real"]
    assert real.stored() == ["real"]


async def test_a_statement_under_way_at_the_end_of_a_test_is_waited_for(real: Real) -> None:
    """Two parallel statements on one connection would break it."""
    shop = Shop.of(real)
    async with shop.database:
        with count_statements(shop.database) as statements:
            async with rolled_back(shop.database):
                task = asyncio.create_task(shop.alone(partial(shop.execute, slow(shop))))
                await becomes_true(lambda: len(statements) == 1)
            with pytest.raises(NotIsolated, match="outlived its test"):
                await task
        await shop.add("real")
    assert real.stored() == ["real"]


@pytest.mark.parametrize("real", ["sqlite-sync", "psycopg-sync", "pymysql-sync"], indirect=True)
def test_the_client_starts_while_the_test_has_a_session_of_its_own(real: Real) -> None:
    """As in fixtures of many templates, requests see the rows of the test's session."""
    engine = create_engine(real.url)
    database = SyncDatabase.from_engine(engine)
    shop = Shop(real, database)
    start = time.monotonic()
    with rolled_back(database), Session(engine) as session:
        session.execute(insert(ENTRY).values(note="of the test"))
        with client_for(shop, "FastAPI") as client:
            assert client.post("/one").text == "2"
        assert session.scalars(select(ENTRY.c.note).order_by(ENTRY.c.id)).all()[-1] == "one"
        session.rollback()
    assert time.monotonic() - start < 5
    assert real.stored() == []
    engine.dispose()


async def test_waiting_for_a_session_of_the_tests_own_names_the_cure(real: Real) -> None:
    """The error comes within a second if the session cannot be recognized as the test's."""
    shop = Shop.of(real)
    async with rolled_back(shop.database):
        engine: Any = shop.database.engine

        async def hold() -> None:
            connection = engine.connect()
            connection = connection if real.is_sync else await connection
            await finish(connection.execute(select(1)))
            held.set()
            await done.wait()
            await finish(connection.close())

        held, done = asyncio.Event(), asyncio.Event()
        holding = asyncio.create_task(hold())
        await held.wait()
        start = time.monotonic()
        with pytest.raises(NotIsolated, match=r"`Session\(engine\)`.*`database\.begin\(\)`"):
            await asyncio.create_task(shop.database.ping())
        assert time.monotonic() - start < 1.5
        done.set()
        await holding


async def test_statements_are_counted(shop: Shop) -> None:
    """All statements count; too many statements raise an error that lists them."""
    with count_statements(shop.database, at_most=2) as statements:
        await get(shop.app, "/one/201")
    assert len(statements) == 2
    assert statements[0].startswith("INSERT INTO entry")
    with (
        pytest.raises(AssertionError, match="2 statements instead of at most 1") as caught,
        count_statements(shop.database, at_most=1),
    ):
        await get(shop.app, "/two/201")
    assert "\n1. INSERT INTO entry (note)" in str(caught.value)
    assert "two" in str(caught.value)
    with pytest.raises(ZeroDivisionError), count_statements(shop.database, at_most=0):
        await shop.add("three")
        _ = 1 / 0


async def test_statements_of_a_database_that_is_not_running_cannot_be_counted(real: Real) -> None:
    """Without a running database, no statement could be sent."""
    with pytest.raises(DatabaseNotRunning), count_statements(real.describe()):
        pass
