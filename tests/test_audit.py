"""What `begin()` stores survives the rollback of its request, as the page on it says."""

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import postgres
import pytest
from asgi import Exchange
from pages import Page
from sqlalchemy import URL, create_engine, delete, insert, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool

from asgi_dbsession import AsyncDatabase, get_session

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/audit-rows.md")
LOGIN, LOCKS, TASK = PAGE.blocks()
POOL = "from_env(pool_size=10)"


@pytest.fixture(scope="module")
def url() -> URL:
    """An empty database."""
    return postgres.new_database("audit").set(drivername="postgresql+asyncpg")


@pytest.fixture
async def login(
    url: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ModuleType]:
    """The module of the page, running on a pool of two, with one account."""
    assert POOL in LOGIN
    code = LOGIN.replace(POOL, "from_env(pool_size=2, max_overflow=0, pool_timeout=0.2)")
    (tmp_path / "login.py").write_text(code + "\n\n" + TASK)
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    module = importlib.import_module("login")
    async with module.database as database, module.audit:
        async with database.engine.begin() as connection:
            await connection.run_sync(module.Base.metadata.drop_all)
            await connection.run_sync(module.Base.metadata.create_all)
            await connection.execute(insert(module.Account).values(name="ann", password="right"))
        yield module
    sys.modules.pop("login")


def stored(url: URL) -> list[str]:
    """The outcomes that are really there."""
    engine = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with engine.connect() as connection:
        return list(connection.scalars(text("SELECT outcome FROM attempt ORDER BY id")))


async def post(app: Any, path: str, query: str) -> Exchange:
    """Send a request."""
    exchange = Exchange(app, path, method="POST")
    exchange.scope["query_string"] = query.encode()
    return await exchange.run()


async def log_in(login: Any, password: str) -> Exchange:
    """Send a request of the page's example."""
    return await post(login.app, "/login", f"name=ann&password={password}")


async def test_a_refused_login_is_stored(login: Any, url: URL) -> None:
    """The audit row is stored although its request was rolled back."""
    assert (await log_in(login, "right")).status == 204
    assert stored(url) == []
    assert (await log_in(login, "wrong")).status == 401
    assert stored(url) == ["refused"]


async def test_a_cancelled_request_keeps_it_too(login: Any, url: URL) -> None:
    """The block completes although the request was cancelled."""
    record, recorded = login.record, asyncio.Event()

    async def record_and_wait(*args: Any) -> None:
        await record(*args)
        recorded.set()
        await asyncio.Event().wait()

    login.record = record_and_wait
    request = asyncio.create_task(log_in(login, "wrong"))
    await recorded.wait()
    request.cancel()
    await asyncio.wait([request])
    assert stored(url) == ["refused"]


def meeting(record: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Let two requests hold one connection each before both record an audit row."""
    barrier = asyncio.Barrier(2)

    async def meet_then_record(*args: Any) -> None:
        await barrier.wait()
        await record(*args)

    return meet_then_record


async def test_a_pool_of_its_own_keeps_requests_from_waiting_for_each_other(
    login: Any, url: URL
) -> None:
    """The audit database has as many connections as the pool of the requests."""
    login.record = meeting(login.record)
    found = await asyncio.gather(log_in(login, "wrong"), log_in(login, "wrong"))
    assert [each.status for each in found] == [401, 401]
    assert stored(url) == ["refused", "refused"]


async def test_on_one_pool_they_wait_for_each_other(login: Any, url: URL) -> None:
    """Both requests wait until the time-out of the pool."""
    login.audit = login.database
    login.record = meeting(login.record)
    found = await asyncio.gather(log_in(login, "wrong"), log_in(login, "wrong"))
    assert PoolTimeout in {type(each.error) for each in found}
    assert login.database.engine.pool.checkedout() == 0


async def test_on_one_pool_they_need_not_hold_anything(login: Any, url: URL) -> None:
    """After a rollback, the connection is free for the block."""
    record = meeting(login.record)

    async def give_back_then_record(*args: Any) -> None:
        await get_session().rollback()
        await record(*args)

    login.audit = login.database
    login.record = give_back_then_record
    found = await asyncio.gather(log_in(login, "wrong"), log_in(login, "wrong"))
    assert [each.status for each in found] == [401, 401]
    assert stored(url) == ["refused", "refused"]


@pytest.fixture
async def audit(url: URL) -> AsyncIterator[AsyncDatabase]:
    """The database with a limit for locks that the page shows."""
    address = '"postgresql+asyncpg://app@db/shop"'
    assert address in LOCKS
    assert '"2s"' in LOCKS
    namespace: dict[str, Any] = {"URL": url}
    exec(LOCKS.replace(address, "URL").replace('"2s"', '"50ms"'), namespace)
    async with namespace["audit"] as database:
        yield database


async def test_a_limit_ends_the_wait_for_a_lock_of_the_request(
    login: Any, audit: AsyncDatabase
) -> None:
    """PostgreSQL cannot detect this deadlock, because one side waits in the application."""
    async with login.database.begin() as session:
        await session.execute(update(login.Account).values(password="new"))
        with pytest.raises(DBAPIError, match="lock timeout"):
            async with audit.begin() as another:
                await another.execute(update(login.Account).values(password="newer"))


async def test_a_foreign_key_meets_what_the_request_has_done(
    login: Any, audit: AsyncDatabase
) -> None:
    """The block does not see rows that the request inserted, and waits for rows that it deleted."""
    refer = text("INSERT INTO reference VALUES (:name)")
    async with login.database.engine.begin() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS reference"))
        await connection.execute(text("CREATE TABLE reference (name text REFERENCES account)"))
    try:
        async with login.database.begin() as session:
            session.add(login.Account(name="bob", password="right"))
            await session.flush()
            with pytest.raises(IntegrityError):
                async with audit.begin() as another:
                    await another.execute(refer, {"name": "bob"})
            await session.execute(delete(login.Account))
            with pytest.raises(DBAPIError, match="lock timeout"):
                async with audit.begin() as another:
                    await another.execute(refer, {"name": "ann"})
    finally:
        async with login.database.engine.begin() as connection:
            await connection.execute(text("DROP TABLE reference"))


async def test_sqlite_has_one_writer(tmp_path: Path) -> None:
    """After a write of the request the block fails; after a rollback the block succeeds."""
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    write = text("INSERT INTO attempt VALUES ('refused')")
    async with AsyncDatabase(url, connect_args={"timeout": 0.05}) as database:
        async with database.engine.begin() as connection:
            await connection.execute(text("CREATE TABLE attempt (outcome TEXT)"))
        async with database.begin() as session:
            await session.execute(write)
            with pytest.raises(OperationalError, match="database is locked"):
                async with database.begin() as another:
                    await another.execute(write)
            await session.rollback()
            async with database.begin() as another:
                await another.execute(write)
        async with database.begin() as session:
            assert await session.scalar(text("SELECT count(*) FROM attempt")) == 1


async def test_a_background_task_survives_the_rollback_of_its_request(login: Any, url: URL) -> None:
    """The block has a new transaction on the connection that the request returned."""
    assert (await post(login.app, "/guess", "name=ann")).status == 401
    assert stored(url) == ["guessed"]
