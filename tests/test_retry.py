"""Tests that a request with a conflict in the database runs again, as if for the first time."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from weakref import WeakSet

import anyio
import pytest
from asgi import Exchange, Message, Socket, get, respond
from conftest import ENTRY, Real, Running, checked_out, real_database
from sqlalchemy import Connection, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from asgi_dbsession import (
    AsyncDatabase,
    DBSessionMiddleware,
    TransactionAborted,
    on_commit,
    set_rollback,
)
from asgi_dbsession.retry.replay import BODY_LIMIT

pytestmark = pytest.mark.anyio

KINDS = ("asyncpg", "psycopg", "psycopg-sync", "asyncmy", "pymysql-sync")


async def lose(running: Running, state: str = "40001", number: int = 1213) -> None:
    """Let the server refuse a statement, as after a conflict with another transaction."""
    if running.real.is_mariadb:
        refuse = f"SIGNAL SQLSTATE '{state}' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'lost'"
    else:
        refuse = f"DO $$ BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '{state}'; END $$"
    await running.execute(text(refuse))


class Race:
    """A handler that writes a row, and meets a conflict in its first attempts.

    Args:
        running: Where.
        losses: How many it loses.
    """

    def __init__(self, running: Running, losses: int = 1) -> None:
        self.running = running
        self.losses = losses
        self.runs = 0

    async def run(self) -> None:
        self.runs += 1
        await self.running.write("kept")
        if self.runs <= self.losses:
            await lose(self.running)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.run()
        await respond(send, 201)

    async def answered(self, scope: Any, receive: Any, send: Any) -> None:
        """The handler in a framework that answers every error itself."""
        try:
            await self(scope, receive, send)
        except Exception as error:
            await respond(send, 500, type(error).__name__.encode())


@pytest.fixture
async def postgresql(tmp_path: Path) -> AsyncIterator[Running]:
    """Tests without a relation to a kind of database use one kind."""
    real = real_database("asyncpg", tmp_path)
    async with real.describe() as database:
        yield Running(real, database)
        await real.assert_clean(database)
    real.reader.dispose()


def ours(app: Any, running: Running, attempts: int = 3, **options: Any) -> DBSessionMiddleware:
    return DBSessionMiddleware(app, running.database, attempts=attempts, **options)


# What is a conflict, and where a conflict may happen


async def test_a_lost_race_is_run_again_as_if_it_had_never_been(running: Running) -> None:
    """Work of failed attempts is not stored, and the last attempt is answered."""
    race = Race(running, losses=2)
    exchange = await get(ours(race, running))
    assert (exchange.status, race.runs, running.stored()) == (201, 3, ["kept"])


@pytest.mark.parametrize("answers", [False, True])
async def test_the_last_attempt_reaches_the_client_as_it_is(
    postgresql: Running, answers: bool
) -> None:
    """The server gets the error, or the client gets the response of the framework."""
    race = Race(postgresql, losses=9)
    exchange = await get(ours(race.answered if answers else race, postgresql))
    assert (race.runs, postgresql.stored()) == (3, [])
    if answers:
        assert (exchange.status, exchange.body) == (500, b"DBAPIError")
    else:
        assert isinstance(exchange.error, DBAPIError)
        assert exchange.messages == []


@pytest.mark.parametrize("attempts", [1, 2])
async def test_it_is_a_choice(postgresql: Running, attempts: int) -> None:
    """By default, a request runs only once."""
    race = Race(postgresql)
    options: dict[str, Any] = {} if attempts == 1 else {"attempts": attempts}
    exchange = await get(DBSessionMiddleware(race, postgresql.database, **options))
    assert (race.runs, exchange.status) == ((1, None) if attempts == 1 else (2, 201))


@pytest.mark.parametrize(
    ("state", "number", "runs"),
    [
        ("40001", 1213, 2),
        ("40P01", 1205, 2),
        ("40000", 1020, 2),
        ("40003", 1062, 1),  # PostgreSQL: the result of COMMIT is unknown
        ("23505", 1048, 1),
        ("57014", 1317, 1),
    ],
)
async def test_only_a_lost_race_is_run_again(
    running: Running, state: str, number: int, runs: int
) -> None:
    """A conflict is recognized by the class of its SQLSTATE, or by its number on MariaDB."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(1)
        if len(seen) == 1:
            sqlstate = "45000" if running.real.is_mariadb else state
            await lose(running, sqlstate, number)
        await respond(send)

    await get(ours(app, running))
    assert len(seen) == runs


@pytest.mark.parametrize("real", ["asyncpg", "psycopg", "psycopg-sync"], indirect=True)
@pytest.mark.parametrize("attempts", [1, 3])
async def test_a_migration_under_running_code_is_run_again(running: Running, attempts: int) -> None:
    """The type of a column in a prepared statement has changed; the work is done once."""
    reader, runs = running.real.reader, []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(scope["path"])
        await running.write(scope["path"])
        amount = await running.call("scalar", text("SELECT amount FROM migrated"))
        await respond(send, body=str(amount).encode())

    served = ours(app, running, attempts)
    with reader.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS migrated"))
        connection.execute(text("CREATE TABLE migrated AS SELECT 1::integer AS amount"))
    for number in range(10):  # psycopg prepares frequent statements
        assert (await get(served, f"/{number}")).status == 200
    with reader.begin() as connection:
        connection.execute(text("ALTER TABLE migrated ALTER amount TYPE text"))
    exchange = await get(served, "/after")
    with reader.begin() as connection:
        connection.execute(text("DROP TABLE migrated"))
    if attempts == 1:
        assert "plan" in str(exchange.error)  # each driver has its own text
        assert (runs.count("/after"), running.stored().count("/after")) == (1, 0)
    else:
        assert (exchange.status, exchange.body) == (200, b"1"), repr(exchange.error)
        assert (runs.count("/after"), running.stored().count("/after")) == (2, 1)


async def lose_at_commit(running: Running) -> None:
    """Read rows that another transaction writes, and write rows that it has read."""
    count = select(func.count()).select_from(ENTRY)
    await running.execute(count)
    await running.write("mine")
    with running.real.reader.connect() as other:
        other.execution_options(isolation_level="SERIALIZABLE")
        other.execute(count)
        other.execute(ENTRY.insert().values(note="other"))
        other.commit()


async def test_a_server_that_cannot_be_reached_is_no_lost_race() -> None:
    """The next attempts would not reach it either."""
    url = "postgresql+psycopg://app@127.0.0.1:1/shop"
    runs: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(scope["path"])
        await database.get_session().execute(text("SELECT 1"))

    async with AsyncDatabase(url, ping_on_startup=False) as database:
        exchange = await get(DBSessionMiddleware(app, database, attempts=3))
    assert isinstance(exchange.error, DBAPIError)
    assert len(runs) == 1


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "psycopg-sync"])
async def test_a_race_that_only_commit_can_lose_is_run_again(driver: str, tmp_path: Path) -> None:
    """PostgreSQL reports it at COMMIT; `on_commit_error` is not called, functions run once."""
    real = real_database(driver, tmp_path)
    runs, asked, called = [], [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(1)
        on_commit(lambda: called.append(len(runs)))
        if len(runs) == 1:
            await lose_at_commit(running)
        else:
            await running.write("mine")
        await respond(send)

    def ask(error: Exception) -> None:
        asked.append(error)

    async with real.describe(isolation_level="SERIALIZABLE") as database:
        running = Running(real, database)
        exchange = await get(ours(app, running, on_commit_error=ask))
        assert (exchange.status, len(runs), asked, called) == (200, 2, [], [2])
        assert real.stored() == ["other", "mine"]
        await running.assert_clean()
    real.reader.dispose()


async def test_on_commit_error_answers_the_last_attempt(tmp_path: Path) -> None:
    """`on_commit_error` is called once, and its response is sent."""
    real = real_database("asyncpg", tmp_path)
    asked = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with real.reader.begin() as other:
            other.execute(ENTRY.delete())
        await lose_at_commit(running)
        await respond(send)

    def ask(error: Exception) -> Any:
        asked.append(error)
        return PlainTextResponse("busy", 409)

    async with real.describe(isolation_level="SERIALIZABLE") as database:
        running = Running(real, database)
        exchange = await get(ours(app, running, on_commit_error=ask))
        assert (exchange.status, exchange.body, len(asked)) == (409, b"busy", 1)
        await running.assert_clean()
    real.reader.dispose()


async def test_an_error_that_is_swallowed_is_run_again_where_it_cost_the_work(
    running: Running,
) -> None:
    """A success that COMMIT refuses is not sent; the last attempt raises the error."""
    runs = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(1)
        await running.write("kept")
        if len(runs) < 3:
            with pytest.raises(DBAPIError):
                await lose(running)
        await respond(send)

    assert isinstance((await get(ours(app, running, attempts=2))).error, TransactionAborted)
    assert (await get(ours(app, running, attempts=2))).status == 200
    assert (len(runs), running.stored()) == (3, ["kept"])


@pytest.mark.parametrize("writes", [False, True])
async def test_a_handler_that_gets_over_it_is_not_run_again(
    postgresql: Running, writes: bool
) -> None:
    """A success response is sent, with or without a write."""
    race = Race(postgresql)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(DBAPIError):
            await race.run()
        await postgresql.call("rollback")
        if writes:
            await postgresql.write("later")
        await respond(send, 200)

    assert (await get(ours(app, postgresql))).status == 200
    assert (race.runs, postgresql.stored()) == (1, ["later"] if writes else [])


# When a request does not run again


async def commit(stack: AsyncExitStack, running: Running) -> None:
    await running.write("committed")
    await running.call("commit")


async def commit_block(stack: AsyncExitStack, running: Running) -> None:
    async with running.database.get_session().begin():
        await running.write("committed")


async def commit_own_unit(stack: AsyncExitStack, running: Running) -> None:
    assert isinstance(running.database, AsyncDatabase)
    async with running.database.begin() as session:
        await session.execute(ENTRY.insert().values(note="committed"))


async def commit_in_open_unit(stack: AsyncExitStack, running: Running) -> None:
    assert isinstance(running.database, AsyncDatabase)
    session = await stack.enter_async_context(running.database.begin())
    await session.execute(ENTRY.insert().values(note="committed"))
    await session.commit()


async def commit_in_task(stack: AsyncExitStack, running: Running) -> None:
    await asyncio.create_task(commit_own_unit(stack, running))


async def commit_on_engine(stack: AsyncExitStack, running: Running) -> None:
    assert isinstance(running.database, AsyncDatabase)
    async with running.database.engine.begin() as connection:
        await connection.execute(ENTRY.insert().values(note="committed"))


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize(
    "work",
    [
        commit,
        commit_block,
        commit_own_unit,
        commit_in_open_unit,
        commit_in_task,
        commit_on_engine,
    ],
)
async def test_never_after_the_handler_committed(
    postgresql: Running, work: Callable[..., Any], answers: bool
) -> None:
    """Otherwise the committed work would be done twice."""
    race, runs = Race(postgresql, losses=9), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(1)
        try:
            async with AsyncExitStack() as stack:
                await work(stack, postgresql)
                await race.run()
        except DBAPIError:
            if not answers:
                raise
            await respond(send, 500)

    exchange = await get(ours(app, postgresql))
    assert (runs, postgresql.stored()) == ([1], ["committed"])
    assert exchange.status == (500 if answers else None)


async def test_a_commit_of_the_handlers_that_lost_is_run_again(tmp_path: Path) -> None:
    """The failed COMMIT has stored nothing; later work is stored once."""
    real = real_database("asyncpg", tmp_path)
    runs = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(1)
        if len(runs) == 1:
            await lose_at_commit(running)
        await running.call("commit")
        await respond(send)

    async with real.describe(isolation_level="SERIALIZABLE") as database:
        running = Running(real, database)
        assert (await get(ours(app, running))).status == 200
        assert (len(runs), real.stored()) == (2, ["other"])
        await running.assert_clean()
    real.reader.dispose()


@pytest.mark.parametrize("of_engine", [False, True])
async def test_never_where_each_statement_is_stored_at_once(
    postgresql: Running, of_engine: bool
) -> None:
    """AUTOCOMMIT of the engine or connection has stored the work, so no retry is possible."""
    race = Race(postgresql, losses=9)
    level: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        race.running = running
        if not of_engine:
            assert isinstance(database, AsyncDatabase)
            await database.get_session().connection(execution_options=level)
        await race.answered(scope, receive, send)

    async with postgresql.real.describe(**(level if of_engine else {})) as database:
        running = Running(postgresql.real, database)
        exchange = await get(ours(app, running))
    assert (race.runs, exchange.status, postgresql.stored()) == (1, 500, ["kept"])


@pytest.mark.parametrize("where", ["session", "begin", "engine"])
@pytest.mark.parametrize("then", ["raised", "answered", "conflict elsewhere"])
async def test_never_after_a_statement_that_was_stored_at_once(
    postgresql: Running, where: str, then: str
) -> None:
    """The error comes from somewhere else, but another run would store the row again."""
    runs = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal runs
        runs += 1
        insert = ENTRY.insert().values(note=f"stored {runs}")
        if where == "session":
            await automatic.get_session().execute(insert)
        elif where == "begin":
            with suppress(KeyError):
                async with automatic.begin() as session:
                    await session.execute(insert)
                    raise KeyError
        else:
            async with automatic.engine.connect() as connection:
                await connection.execute(insert)
        if then == "conflict elsewhere":
            await lose(postgresql)
        elif then == "raised":
            raise LookupError
        try:
            raise LookupError
        except LookupError:
            await respond(send, 500)

    async with postgresql.real.describe(isolation_level="AUTOCOMMIT") as database:
        automatic: Any = database
        middleware = DBSessionMiddleware(
            app, postgresql.database, automatic, attempts=3, retry_on=LookupError
        )
        await get(middleware)
    assert (runs, postgresql.stored()) == (1, ["stored 1"])


@pytest.mark.parametrize("by", ["begin", "commit"])
async def test_never_after_a_commit_on_an_engine_with_a_copy(postgresql: Running, by: str) -> None:
    """A copy with other options has been used before the engine."""
    engine = create_async_engine(postgresql.real.url)
    copy = AsyncDatabase.from_engine(engine.execution_options(isolation_level="AUTOCOMMIT"))
    database = AsyncDatabase.from_engine(engine)
    running = Running(postgresql.real, database)
    race = Race(running)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if by == "begin":
            async with database.begin():
                await running.write(f"stored {race.runs}")
        else:
            await running.write(f"stored {race.runs}")
            await running.call("commit")
        await race(scope, receive, send)

    exchange = await get(ours(app, running))
    assert isinstance(exchange.error, DBAPIError)
    assert (race.runs, postgresql.stored()) == (1, ["stored 0"])
    await engine.dispose()
    del copy


async def test_a_conflict_on_a_copied_engine_is_run_again(postgresql: Running) -> None:
    """The COMMIT of a copy is recorded once, although its original is in use too."""
    engine = create_async_engine(postgresql.real.url)
    level = engine.execution_options(isolation_level="SERIALIZABLE")
    databases = [AsyncDatabase.from_engine(each) for each in (engine, level)]
    running = Running(postgresql.real, databases[1])
    runs = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            await lose_at_commit(running)
        await respond(send)

    assert (await get(ours(app, running))).status == 200
    assert (runs, postgresql.stored()) == (2, ["other"])
    await engine.dispose()


async def test_a_commit_on_an_engine_that_no_database_has_is_done_again(
    postgresql: Running,
) -> None:
    """A rollback of the request does not affect this work, like a sent mail."""
    race = Race(postgresql)
    engine = create_async_engine(postgresql.real.url)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with engine.begin() as connection:
            await connection.execute(ENTRY.insert().values(note=f"log {race.runs}"))
        await race(scope, receive, send)

    exchange = await get(ours(app, postgresql))
    await engine.dispose()
    assert exchange.status == 201
    assert (race.runs, postgresql.stored()) == (2, ["log 0", "log 1", "kept"])


@pytest.mark.parametrize("answered", [False, True])
async def test_however_often_a_request_commits_it_keeps_no_connections(
    postgresql: Running, answered: bool
) -> None:
    """At most one attempt is kept until its answer; streams and later tasks keep none."""
    kept = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert isinstance(postgresql.database, AsyncDatabase)
        if answered:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        connections: WeakSet[Connection] = WeakSet()
        for _ in range(3):
            async with postgresql.database.engine.begin() as connection:
                connections.add(await connection.run_sync(lambda each: each))
            del connection
        gc.collect()
        kept.append(len(connections))
        if not answered:
            await respond(send)

    assert (await get(ours(app, postgresql))).status == 200
    assert kept == [0 if answered else 1]


async def test_a_savepoint_that_was_released_is_no_commit(postgresql: Running) -> None:
    """A savepoint commits nothing: a conflict rolls its work back, and the retry does it again."""
    race = Race(postgresql)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with postgresql.database.get_session().begin_nested():
            await postgresql.write("nested")
        await race.run()
        await respond(send)

    assert (await get(ours(app, postgresql))).status == 200
    assert (race.runs, postgresql.stored()) == (2, ["nested", "kept"])


@pytest.mark.parametrize("answers", [False, True])
async def test_never_when_it_was_cancelled(postgresql: Running, answers: bool) -> None:
    """Also if the framework took the cancellation for an error, or during the pause."""
    race = Race(postgresql, losses=9)
    lost = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await race.run()
        except DBAPIError:
            lost.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if not answers:
                    raise
        await respond(send, 500)

    exchange = Exchange(ours(app, postgresql), "/")
    task = asyncio.create_task(exchange.run())
    await lost.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (race.runs, exchange.messages) == (1, [])


@pytest.mark.parametrize("where", ["raised", "answered", "handled before"])
async def test_a_task_group_that_fails_is_no_cancellation(postgresql: Running, where: str) -> None:
    """Before Python 3.13, it leaves the task of the request as if the server had cancelled it."""
    runs = 0
    database: Any = postgresql.database

    async def lose_in_group() -> None:
        async def work() -> None:
            async with database.begin():
                if runs == 1:
                    await lose(postgresql)

        async with asyncio.TaskGroup() as group:
            group.create_task(work())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal runs
        runs += 1
        try:
            await lose_in_group()
        except* DBAPIError:
            if where == "raised":
                raise
            if where == "answered":
                await respond(send, 500)
            await lose(postgresql)
        await respond(send, 201)

    # A server may have such a number in its task already.
    with suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
    exchange = await get(ours(app, postgresql))
    assert (exchange.status, exchange.error, runs) == (201, None, 2)


async def fail() -> None:
    """Fail in a child task.

    Raises:
        LookupError: Always.
    """
    raise LookupError


async def test_a_cancelled_request_with_a_task_group_that_fails_never_runs_again(
    postgresql: Running,
) -> None:
    """The group takes the place of the cancellation with the errors of its children."""
    runs, waiting = 0, asyncio.Event()

    async def work() -> None:
        try:
            waiting.set()
            await asyncio.sleep(60)
        finally:
            await lose(postgresql)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal runs
        runs += 1
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(work())
        except* DBAPIError:
            await respond(send, 500)

    exchange = Exchange(ours(app, postgresql))
    task = asyncio.create_task(exchange.run())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (runs, exchange.messages) == (1, [])


async def test_a_cancelled_pause_ends_the_request(
    postgresql: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no further attempt, and nothing of the first attempt is stored."""
    race = Race(postgresql, losses=9)
    pausing = asyncio.Event()

    async def pause(_: float) -> None:
        pausing.set()
        await asyncio.sleep(60)

    monkeypatch.setattr("anyio.sleep", pause)
    exchange = Exchange(ours(race, postgresql))
    task = asyncio.create_task(exchange.run())
    await pausing.wait()
    assert checked_out(postgresql.database) == 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (race.runs, exchange.messages) == (1, [])


@pytest.mark.parametrize("losses", [0, 1])
async def test_something_cancelled_that_is_the_applications_own_reaches_the_server(
    postgresql: Running, losses: int
) -> None:
    """In each attempt: the request was not cancelled, and not answered."""
    race = Race(postgresql, losses)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await race.run()
        given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        given_up.cancel()
        await given_up

    with pytest.raises(asyncio.CancelledError):
        await get(ours(app, postgresql))
    assert (race.runs, postgresql.stored()) == (losses + 1, [])


@pytest.mark.parametrize("by", ["task", "scope"])
async def test_another_attempt_can_be_cancelled_too(postgresql: Running, by: str) -> None:
    """The request is cancelled by its server, or by a time limit of outer middleware."""
    race = Race(postgresql)
    waiting = asyncio.Event()
    ended: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await race.run()
        waiting.set()
        await asyncio.sleep(60)

    async def serve() -> None:
        with limit:
            await get(ours(app, postgresql))
        ended.append(limit.cancelled_caught)

    limit = anyio.CancelScope()
    task = asyncio.create_task(serve())
    await waiting.wait()
    if by == "scope":
        limit.cancel()
        await task
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (race.runs, ended) == (2, [True] if by == "scope" else [])
    assert postgresql.stored() == []


async def test_pauses_are_short_and_random(
    postgresql: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pauses double, up to a second, and no connection is held meanwhile."""
    longest = []

    def draw(_self: object, _least: float, most: float) -> float:
        longest.append((most, checked_out(postgresql.database)))
        return 0

    monkeypatch.setattr("random.SystemRandom.uniform", draw)
    await get(ours(Race(postgresql, losses=99), postgresql, attempts=8))
    assert longest == [(each, 0) for each in (0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0)]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_never_when_the_client_is_gone(postgresql: Running, when: str) -> None:
    """The client disconnects before the response of the failed attempt, or while it is withheld."""
    race = Race(postgresql, losses=9)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        with pytest.raises(DBAPIError):
            await race.run()
        try:
            if when == "before":
                assert (await receive())["type"] == "http.disconnect"
            await respond(send, 500)
        finally:
            if when == "after":
                assert (await receive())["type"] == "http.disconnect"

    exchange = Exchange(ours(app, postgresql))
    exchange.hang_up.set()
    await exchange.run()  # raises an exception that is no `Exception`
    assert (race.runs, exchange.error) == (1, None)
    assert exchange.status == (500 if when == "before" else None)


@pytest.mark.parametrize("swallows", [False, True])
@pytest.mark.parametrize("spoils", ["commits", "reads too much"])
async def test_a_response_that_was_withheld_for_nothing_leaves_the_error(
    postgresql: Running, spoils: str, swallows: bool
) -> None:
    """Later work of the application may prevent a retry; the server then gets the error."""
    race = Race(postgresql, losses=9)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(DBAPIError):
            await race.run()
        try:
            await respond(send, 409)
        except BaseException:
            if not swallows:
                raise
        finally:
            if spoils == "commits":
                await commit_own_unit(AsyncExitStack(), postgresql)
            else:
                await read(receive)

    sender = Sender(b"x" * BODY_LIMIT, b"more")
    with pytest.raises(DBAPIError, match="lost"):
        await sender.ask(ours(app, postgresql))
    assert (race.runs, sender.sent) == (1, [])
    assert postgresql.stored() == (["committed"] if spoils == "commits" else [])


async def test_never_on_a_socket(postgresql: Running) -> None:
    """Sent messages cannot be taken back."""
    race = Race(postgresql, losses=9)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await race.run()

    socket = await Socket(ours(app, postgresql)).run()
    assert isinstance(socket.error, DBAPIError)
    assert race.runs == 1


@pytest.mark.parametrize("kind", ["http.response.early_hint", "http.response.push"])
async def test_never_after_anything_was_sent(postgresql: Running, kind: str) -> None:
    """Early hints are sent messages too."""
    race = Race(postgresql, losses=9)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": kind, "links": []})
        await race.answered(scope, receive, send)

    exchange = await get(ours(app, postgresql))
    assert (race.runs, exchange.status) == (1, 500)


async def test_a_race_lost_after_the_start_is_the_servers_to_hear(postgresql: Running) -> None:
    """A started stream cannot be retried; a conflict before its start can."""
    race = Race(postgresql, losses=2)

    async def stream(request: Request) -> Response:
        if race.runs == 0:
            await race.run()

        async def body() -> AsyncIterator[bytes]:
            yield b"begun"
            await race.run()

        return StreamingResponse(body())

    app = ours(Starlette(routes=[Route("/", stream)]), postgresql)
    exchange = await get(app)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"begun", False)
    assert isinstance(exchange.error, DBAPIError)
    assert (race.runs, postgresql.stored()) == (2, [])


async def test_background_work_of_a_lost_attempt_never_runs(postgresql: Running) -> None:
    """The background task of a withheld response does not run."""
    race = Race(postgresql)
    done: list[Any] = []

    def handle(request: Request, error: Exception) -> Response:
        return PlainTextResponse("", 500, background=BackgroundTask(done.append, "error"))

    async def handler(request: Request) -> Response:
        await race.run()
        return PlainTextResponse("", background=BackgroundTask(done.append, race.runs))

    app = Starlette(routes=[Route("/", handler)], exception_handlers={DBAPIError: handle})
    assert (await get(ours(app, postgresql))).status == 200
    assert done == [2]


# The state at the start of a retry


class Sender:
    """A client that sends its body in many messages."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = list(parts)
        self.sent: list[Message] = []
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        if self.parts:
            part = self.parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.parts)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def ask(self, app: Any) -> None:
        await app({"type": "http", "headers": []}, self.receive, self.send)


async def read(receive: Any, messages: int = 99) -> bytes:
    body = b""
    for _ in range(messages):
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return body


@pytest.mark.parametrize("at_first", [0, 1, 3, 99])
async def test_each_attempt_receives_the_whole_body(postgresql: Running, at_first: int) -> None:
    """The body is complete in each attempt, for any number of messages and any part read before."""
    race, bodies = Race(postgresql), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = await read(receive, 99 if race.runs else at_first)
        await race.run()
        bodies.append(body)
        await respond(send)

    await Sender(*(b"%d," % each for each in range(50))).ask(ours(app, postgresql))
    assert bodies == [b"".join(b"%d," % each for each in range(50))]
    assert race.runs == 2


@pytest.mark.parametrize(("more", "runs"), [(0, 2), (1, 1)])
async def test_a_body_over_the_limit_is_served_whole_once(
    postgresql: Running, more: int, runs: int
) -> None:
    """A body with one byte less is kept, and the request can run again."""
    race, sizes = Race(postgresql), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sizes.append(len(await read(receive)))
        await race.answered(scope, receive, send)

    half = BODY_LIMIT // 2
    await Sender(b"x" * half, b"y" * half, b"z" * more).ask(ours(app, postgresql))
    assert sizes == [BODY_LIMIT + more] * runs


async def test_another_attempt_hears_of_the_client_that_leaves(postgresql: Running) -> None:
    """After the kept body, `receive` continues with new messages."""
    race, heard = Race(postgresql), []
    sender = Sender(b"body")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append((await receive())["type"])
        await race.run()
        sender.gone.set()
        heard.append((await receive())["type"])

    await sender.ask(ours(app, postgresql))
    assert heard == ["http.request", "http.request", "http.disconnect"]


async def test_what_listens_for_the_client_may_be_cut_off(postgresql: Running) -> None:
    """A framework that waits for a disconnect does so in each attempt."""
    race, bodies = Race(postgresql), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = await read(receive)
        async with asyncio.TaskGroup() as group:
            listener = group.create_task(receive())
            await asyncio.sleep(0)
            await race.run()
            listener.cancel()
        bodies.append(body)
        await respond(send)

    sender = Sender(b"one", b"two")
    await sender.ask(ours(app, postgresql))
    assert (race.runs, bodies) == (2, [b"onetwo"])
    assert sender.sent[0]["status"] == 200


async def test_each_attempt_has_the_scope_as_it_came(postgresql: Running) -> None:
    """Each attempt gets the original scope; outer middleware sees the scope of the last attempt."""
    race, seen = Race(postgresql), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["path"], dict(scope["state"]), list(scope["headers"]), "route" in scope))
        scope["path"] = "/changed"
        scope["route"] = race.runs
        scope["state"]["user"] = race.runs
        scope["headers"].append((b"x-run", b"%d" % race.runs))
        await race(scope, receive, send)

    inner = ours(app, postgresql)
    state: dict[str, Any] = {"client": "kept"}
    scope: dict[str, Any] = {}

    async def outer(given: Any, receive: Any, send: Any) -> None:
        scope.update(given, state=state, headers=[])
        await inner(scope, receive, send)

    await get(outer)
    assert seen == [("/", {"client": "kept"}, [], False)] * 2
    assert (scope["path"], scope["route"], scope["state"]) == ("/changed", 1, state)
    assert state == {"client": "kept", "user": 1}


current_user: ContextVar[str | None] = ContextVar("current_user", default=None)


async def test_each_attempt_has_the_context_as_it_came(postgresql: Running) -> None:
    """No entry of the previous attempt stays, for example an object of a closed session."""
    race, seen = Race(postgresql, losses=2), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current_user.get())
        current_user.set(f"of run {race.runs}")
        await race(scope, receive, send)

    token = current_user.set("outer")
    assert (await get(ours(app, postgresql))).status == 201
    current_user.reset(token)
    assert seen == ["outer"] * 3


async def test_each_attempt_has_a_session_and_a_say_of_its_own(postgresql: Running) -> None:
    """`set_rollback` and `on_commit` of a failed attempt have no effect."""
    race, sessions, called = Race(postgresql), [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sessions.append(postgresql.database.get_session())
        if race.runs == 0:
            set_rollback(True)
        on_commit(lambda: called.append("called"))
        await race(scope, receive, send)

    await get(ours(app, postgresql))
    assert sessions[0] is not sessions[1]
    assert (postgresql.stored(), called) == (["kept"], ["called"])


# Together with other middleware


async def test_an_application_that_is_replaced_is_the_one_that_is_served(
    postgresql: Running,
) -> None:
    """Instrumentation replaces `middleware.app` after the middleware was made."""
    race, seen = Race(postgresql), []

    async def traced(scope: Any, receive: Any, send: Any) -> None:
        seen.append(race.runs)
        await race(scope, receive, send)

    middleware = ours(race, postgresql, retry_after=2)
    middleware.app = traced
    assert (await get(middleware)).status == 201
    assert seen == [0, 1]


@pytest.mark.parametrize("shared", [False, True])
async def test_the_outermost_middleware_runs_a_mounted_application_again(
    postgresql: Running, tmp_path: Path, shared: bool
) -> None:
    """The `attempts` of an inner middleware do not multiply the attempts."""
    race = Race(postgresql, losses=9)
    database = AsyncDatabase(f"sqlite:///{tmp_path / 'inner.db'}")

    async def handler(request: Request) -> Response:
        await race.run()
        return PlainTextResponse("")

    async with database:
        inner = Starlette(routes=[Route("/", handler)])
        inner.add_middleware(
            DBSessionMiddleware, postgresql.database if shared else database, attempts=5
        )
        exchange = await get(ours(Starlette(routes=[Mount("/", inner)]), postgresql), "/")
    assert isinstance(exchange.error, DBAPIError)
    assert race.runs == 3


async def test_never_after_a_commit_below_a_mount(postgresql: Running, tmp_path: Path) -> None:
    """A database that only the inner middleware has is retried too."""
    real = real_database("sqlite", tmp_path)
    race = Race(postgresql, losses=9)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await inner_running.write("committed")
        await inner_running.call("commit")
        await race.answered(scope, receive, send)

    async with real.describe() as database:
        inner_running = Running(real, database)
        exchange = await get(ours(DBSessionMiddleware(app, database), postgresql))
    assert (race.runs, exchange.status, real.stored()) == (1, 500, ["committed"])
    real.reader.dispose()


async def test_never_after_one_of_several_databases_was_committed(
    postgresql: Running, tmp_path: Path
) -> None:
    """The first database may have committed before the second reports a conflict."""
    real: Real = real_database("sqlite", tmp_path)
    runs = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(1)
        await first.write("committed")
        await lose_at_commit(second)
        await respond(send)

    async with (
        real.describe() as database,
        postgresql.real.describe(isolation_level="SERIALIZABLE") as serializable,
    ):
        first, second = Running(real, database), Running(postgresql.real, serializable)
        exchange = await get(DBSessionMiddleware(app, database, serializable, attempts=3))
        assert isinstance(exchange.error, DBAPIError)
    assert (runs, real.stored(), postgresql.stored()) == ([1], ["committed"], ["other"])
    real.reader.dispose()
