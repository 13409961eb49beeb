"""Tests that work which SQLAlchemy and its drivers would lose silently raises an error."""

import asyncio
import gc
from contextlib import suppress
from types import BuiltinMethodType
from typing import Any

import anyio
import pytest
from anyio import to_thread
from asgi import Exchange, Socket, get, respond
from conftest import ENTRY, METADATA, WITH_MARIADB, Real, Running, checked_out
from several import in_session
from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
    TimeoutError as PoolTimeout,
)
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, registry

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DBSessionMiddleware,
    ForbiddenWrite,
    PrematureClose,
    SyncDatabase,
    TransactionAborted,
    get_session,
    set_rollback,
)
from asgi_dbsession.session import failures

pytestmark = pytest.mark.anyio
KINDS = WITH_MARIADB

WRONG = text("SELECT * FROM no_such_table")


class Note:
    """A row of the table, as an object."""

    def __init__(self, note: str) -> None:
        self.note = note


registry(metadata=METADATA).map_imperatively(Note, ENTRY)


async def swallow(running: Running) -> None:
    """Run a statement that fails, and continue after the error."""
    try:
        await running.execute(WRONG)
    except DBAPIError:
        return
    raise AssertionError("the statement did not fail")


async def test_a_swallowed_error_cannot_turn_commit_into_a_rollback(running: Running) -> None:
    """PostgreSQL aborts the transaction; other databases do not, and store the work."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("before")
        await swallow(running)
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    if running.real.is_postgresql:
        assert exchange.messages == []
        assert isinstance(exchange.error, TransactionAborted)
        assert isinstance(exchange.error, SQLAlchemyError)
        assert "begin_nested()" in str(exchange.error)
        assert "no_such_table" in str(exchange.error)
        assert running.stored() == []
    else:
        assert exchange.status == 201
        assert running.stored() == ["before"]


@pytest.mark.parametrize("block", ["begin_nested", "begin"])
async def test_a_swallowed_error_of_a_flush_undoes_its_block(running: Running, block: str) -> None:
    """A `begin()` block fails. A savepoint does not: applications skip a row in this way."""
    with running.real.reader.begin() as connection:
        connection.execute(ENTRY.insert().values(note="taken"))

    async def work() -> None:
        await running.write("lost")
        running.database.get_session().add(Note("taken"))
        with pytest.raises(IntegrityError):
            await running.call("flush")

    async def in_block(manager: Any) -> None:
        if running.real.is_sync:
            with manager:
                await work()
        else:
            async with manager:
                await work()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()
        if block == "begin_nested":
            await running.write("kept")
            await in_block(session.begin_nested())
        else:
            with pytest.raises(PendingRollbackError, match="taken"):
                await in_block(session.begin())
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (201, None)
    assert running.stored() == (["taken", "kept"] if block == "begin_nested" else ["taken"])


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("how", ["answer", "close"])
async def test_a_flush_that_got_no_connection_fails_the_request(
    real: Real, how: str, *, is_nested: bool
) -> None:
    """SQLAlchemy has discarded the new object, and the session has no connection to ask."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = database.get_session()
        if is_nested:
            await running.call("begin_nested")
        session.add(Note("lost"))
        opened: Any = database.engine.connect()
        if real.is_sync:
            with opened, pytest.raises(PoolTimeout):
                await running.call("flush")
        else:
            async with opened:
                with pytest.raises(PoolTimeout):
                    await running.call("flush")
        if how == "close":
            try:
                raise LookupError
            except LookupError:
                await close_here(running)
        await respond(send, 201)

    async with real.describe(pool_size=1, max_overflow=0, pool_timeout=0.1) as database:
        running = Running(real, database)
        exchange = await get(DBSessionMiddleware(app, database))
        assert isinstance(exchange.error, PendingRollbackError | PrematureClose)
        assert exchange.messages == []
        assert real.stored() == []
        await running.assert_clean()


@pytest.mark.parametrize("how", ["answer", "close"])
async def test_a_write_whose_connection_was_closed_fails_the_request(
    running: Running, how: str
) -> None:
    """The close has rolled back the write, and the session has no open connection to ask."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        await in_session(running, lambda session: session.connection().close())
        if how == "close":
            try:
                raise LookupError
            except LookupError:
                await close_here(running)
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.error is None, exchange.status) == (False, None)
    assert running.stored() == []
    await running.assert_clean()


async def test_an_error_inside_a_savepoint_may_be_swallowed(running: Running) -> None:
    """A rollback to the savepoint makes the outer transaction usable again."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("before")
        if isinstance(running.database, SyncDatabase):
            session: Any = running.database.get_session()
            with pytest.raises(DBAPIError), session.begin_nested():
                session.execute(WRONG)
        else:
            session = running.database.get_session()
            with pytest.raises(DBAPIError):
                async with session.begin_nested():
                    await session.execute(WRONG)
        await running.write("after")
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (201, None)
    assert running.stored() == ["before", "after"]


def fail_in_savepoint(session: Session, savepoint: str) -> None:
    """Catch an error in a savepoint, which PostgreSQL then refuses to release."""
    if savepoint == "of the session":
        with session.begin_nested():
            swallow_here(session)
    elif savepoint == "of the connection":
        with session.connection().begin_nested():
            swallow_here(session)
    else:
        session.connection().begin_nested()
        swallow_here(session)


def swallow_here(session: Session) -> None:
    """Run a statement that fails, and continue after the error."""
    with suppress(DBAPIError):
        session.execute(WRONG)


@pytest.mark.parametrize(
    "savepoint", ["of the session", "of the connection", "of the connection, left open"]
)
async def test_an_error_swallowed_twice_is_no_success(running: Running, savepoint: str) -> None:
    """SQLAlchemy does not roll back to a savepoint that was not released, nor does COMMIT."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("before")
        with suppress(DBAPIError):
            await in_session(running, lambda session: fail_in_savepoint(session, savepoint))
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    if running.real.is_postgresql:
        assert exchange.messages == []
        assert isinstance(exchange.error, TransactionAborted)
        assert "no_such_table" in str(exchange.error)
        assert running.stored() == []
    else:
        assert (exchange.status, running.stored()) == (201, ["before"])


async def test_an_error_may_be_swallowed_after_a_rollback(running: Running) -> None:
    """A new transaction is not affected by errors of the last one."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("before")
        await swallow(running)
        await running.call("rollback")
        await running.write("after")
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (201, None)
    assert running.stored() == ["after"]


async def test_an_error_that_harmed_nothing_may_be_swallowed(running: Running) -> None:
    """The database decides: after a savepoint written as SQL, the transaction is usable again."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("before")
        await running.execute(text("SAVEPOINT mine"))
        await swallow(running)
        await running.execute(text("ROLLBACK TO SAVEPOINT mine"))
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (201, None)
    assert running.stored() == ["before"]


@pytest.mark.parametrize("real", ["asyncmy", "pymysql-sync"], indirect=True)
async def test_a_lock_that_mariadb_waits_for_in_vain_may_be_swallowed(running: Running) -> None:
    """MySQL rolls back this statement only, so earlier work is stored."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(text("SET innodb_lock_wait_timeout = 1"))
        # No other test writes this note. With a deleted one, the INSERT would wait for the lock.
        await running.write("kept beside a lock")
        with pytest.raises(OperationalError, match="1205"):
            await running.execute(text("UPDATE entry SET note = 'lost' WHERE note = 'locked'"))
        await respond(send)

    with running.real.reader.connect() as connection:
        connection.execute(text("INSERT INTO entry (note) VALUES ('locked')"))
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL READ COMMITTED"))  # no gaps
        connection.execute(text("START TRANSACTION"))
        connection.execute(text("SELECT note FROM entry WHERE note = 'locked' FOR UPDATE"))
        exchange = await get(DBSessionMiddleware(app, running.database))
        connection.execute(text("ROLLBACK"))
    assert (exchange.status, exchange.error) == (200, None)
    assert running.stored() == ["locked", "kept beside a lock"]


@pytest.mark.parametrize("number", [1020, 1206, 1213])
@pytest.mark.parametrize("real", ["asyncmy", "pymysql-sync"], indirect=True)
async def test_an_error_at_which_mariadb_rolls_back_may_not_be_swallowed(
    running: Running, number: int
) -> None:
    """A deadlock, an outdated row or a full lock table ends the whole transaction."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("before")
        with pytest.raises(DBAPIError, match=str(number)):
            await running.execute(text(f"SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = {number}"))
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert isinstance(exchange.error, TransactionAborted)
    assert (exchange.messages, running.stored()) == ([], [])
    await running.assert_clean()


async def test_an_error_on_the_raw_connection_counts_too(running: Running) -> None:
    """Work through `session.connection()` is checked too."""
    if running.real.is_sync or not running.real.is_postgresql:
        pytest.skip("only PostgreSQL aborts a transaction; async says it all")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        connection = await running.call("connection")
        await running.write("before")
        with pytest.raises(DBAPIError):
            await connection.execute(WRONG)
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert isinstance(exchange.error, TransactionAborted)


async def test_a_commit_of_the_handlers_own_is_refused_too(running: Running) -> None:
    """COMMIT is checked in the handler, in `begin()`, and in `session.begin()`."""
    if not running.real.is_postgresql:
        pytest.skip("only PostgreSQL aborts a transaction")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("before")
        await swallow(running)
        with pytest.raises(TransactionAborted):
            await running.call("commit")
        await respond(send, 400)

    assert (await get(DBSessionMiddleware(app, running.database))).status == 400
    if isinstance(running.database, AsyncDatabase):
        with pytest.raises(TransactionAborted):
            async with running.database.begin():
                await swallow(running)
    assert running.stored() == []


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["before_commit", "after_flush"])
async def test_an_error_that_a_listener_swallows_at_the_end_is_seen_too(
    real: Real, name: str, *, own: bool
) -> None:
    """The statement fails after all work of the handler, just before COMMIT."""

    def swallow_one(session: Session, *_: Any) -> None:
        if name == "before_commit":
            session.flush()  # otherwise SQLAlchemy 2.0 refuses the flush after it
        with pytest.raises(DBAPIError):
            session.execute(WRONG)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        opened: Any = running.database.get_session()
        opened.add(Note(note=scope["path"]))
        if scope["path"] == "/swallowed":
            session = getattr(opened, "sync_session", opened)
            event.listen(session, name, swallow_one, once=True)
        if own:
            await running.call("commit")
        await respond(send, 201)

    # Only our own ROLLBACK is between one request and the next.
    async with real.describe(pool_size=1, max_overflow=0, pool_reset_on_return=None) as database:
        running = Running(real, database)
        middleware = DBSessionMiddleware(app, database)
        exchange = await get(middleware, "/swallowed")
        if real.is_postgresql:
            assert isinstance(exchange.error, TransactionAborted)
            assert (exchange.messages, running.stored()) == ([], [])
        else:
            assert (exchange.status, running.stored()) == (201, ["/swallowed"])
        await running.assert_clean()
        assert (await get(middleware, "/next")).status == 201
        assert running.stored()[-1] == "/next"


async def test_another_engine_of_the_session_is_watched_too(running: Running) -> None:
    """`binds` and `bind_arguments` use engines that belong to no database of the package."""
    if not running.real.is_postgresql:
        pytest.skip("only PostgreSQL aborts a transaction")
    other = create_engine(running.real.url.set(drivername="postgresql+psycopg"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        arguments = {"bind_arguments": {"bind": other}}
        opened: Any = running.database.get_session()
        session: Session = getattr(opened, "sync_session", opened)
        session.execute(ENTRY.insert().values(note="before"), **arguments)
        with pytest.raises(DBAPIError):
            session.execute(WRONG, **arguments)
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    other.dispose()
    assert isinstance(exchange.error, TransactionAborted)
    assert (exchange.messages, running.stored()) == ([], [])


@pytest.mark.parametrize("first", ["engine", "copy"])
@pytest.mark.parametrize("freed", ["engine", "copy", "none"])
@pytest.mark.parametrize("real", ["asyncpg", "psycopg-sync"], indirect=True)
async def test_an_engine_and_its_copy_with_other_options_are_watched(
    real: Real, first: str, freed: str
) -> None:
    """In any order, and also if the database of the other one is freed."""
    kind: Any = SyncDatabase if real.is_sync else AsyncDatabase
    engine: Any = create_engine(real.url) if real.is_sync else create_async_engine(real.url)
    engines = {"engine": engine, "copy": engine.execution_options(logging_token="copy")}
    order = sorted(engines, key=lambda each: each != first)
    databases = {each: kind.from_engine(engines[each]) for each in order}
    databases.pop(freed, None)
    gc.collect()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("before")
        await swallow(running)
        await respond(send, 201)

    for database in databases.values():
        running = Running(real, database)
        exchange = await get(DBSessionMiddleware(app, database))
        assert isinstance(exchange.error, TransactionAborted)
        assert exchange.messages == []
    assert real.stored() == []
    if real.is_sync:
        engine.dispose()
    else:
        await engine.dispose()


class Translated(Exception):
    """The error that a listener of the application raises instead of the driver's."""


@pytest.mark.parametrize("of", ["the class", "the class, added late", "the engine"])
@pytest.mark.parametrize("real", ["asyncpg", "psycopg", "psycopg-sync"], indirect=True)
async def test_a_listener_that_raises_its_own_error_hides_no_failure(real: Real, of: str) -> None:
    """SQLAlchemy calls no listener of `handle_error` after one that raises an exception."""
    kind: Any = SyncDatabase if real.is_sync else AsyncDatabase
    engine: Any = create_engine(real.url) if real.is_sync else create_async_engine(real.url)
    target = getattr(engine, "sync_engine", engine) if of == "the engine" else Engine

    def translate(context: Any) -> None:
        raise Translated

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("before")
        with pytest.raises(Translated):
            await running.execute(WRONG)
        await respond(send, 201)

    if of != "the class, added late":
        event.listen(target, "handle_error", translate)
    # An earlier test has left it there, because it stays in the class.
    elif event.contains(Engine, "handle_error", failures._record_failure):
        event.remove(Engine, "handle_error", failures._record_failure)
    running = Running(real, kind.from_engine(engine))
    if of == "the class, added late":
        event.listen(target, "handle_error", translate)
    try:
        exchange = await get(DBSessionMiddleware(app, running.database))
    finally:
        event.remove(target, "handle_error", translate)
    assert (exchange.messages, running.stored()) == ([], [])
    assert isinstance(exchange.error, Translated | TransactionAborted)
    await running.assert_clean()
    if real.is_sync:
        engine.dispose()
    else:
        await engine.dispose()


async def test_on_commit_error_hears_of_an_aborted_transaction(running: Running) -> None:
    """It is handled like any failed COMMIT."""
    if not running.real.is_postgresql:
        pytest.skip("only PostgreSQL aborts a transaction")

    def answer(error: Exception) -> Any:
        async def conflict(scope: Any, receive: Any, send: Any) -> None:
            await respond(send, 409, type(error).__name__.encode())

        return conflict

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await swallow(running)
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database, on_commit_error=answer))
    assert (exchange.status, exchange.body) == (409, b"TransactionAborted")


async def test_a_killed_connection_is_an_error_and_not_a_loss(running: Running) -> None:
    """The server closes the connection before COMMIT: nothing is stored, and no success is sent."""
    if running.real.is_sqlite:
        pytest.skip("SQLite has no server")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        running.real.kill()
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.messages == []
    assert isinstance(exchange.error, DBAPIError)
    assert running.stored() == []
    await running.assert_clean()


@pytest.mark.parametrize("real", ["asyncpg"], indirect=True)
async def test_a_commit_that_is_never_answered_costs_only_its_own_connection(real: Real) -> None:
    """The next requests use other connections of the pool, and need no new connection."""
    backend = text("SELECT pg_backend_pid()")
    pids: dict[str, int] = {}
    sleeping: list[asyncio.Task[object]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = get_session()
        pids[scope["path"]] = await session.scalar(backend)
        if scope["path"] == "/unanswered":
            async with database.begin() as other:  # the pool then has two connections
                pids["/idle"] = await other.scalar(backend)
            await session.execute(ENTRY.insert().values(note="lost"))
            raw: Any = await (await session.connection()).get_raw_connection()
            # A busy driver does not send COMMIT.
            sleeping.append(asyncio.create_task(raw.driver_connection.fetch("SELECT pg_sleep(30)")))
            await asyncio.sleep(0.1)
        await respond(send)

    database: AsyncDatabase[Any] = AsyncDatabase(real.url, pool_size=2)
    async with database:
        middleware = DBSessionMiddleware(app, database)
        exchange = await get(middleware, "/unanswered")
        assert isinstance(exchange.error, DBAPIError)
        assert (exchange.messages, checked_out(database), real.stored()) == ([], 0, [])
        await asyncio.wait(sleeping)
        assert sleeping[0].exception() is not None
        assert (await get(middleware, "/next")).status == 200
        assert pids["/next"] == pids["/idle"] != pids["/unanswered"]


async def test_what_was_added_and_never_flushed_is_stored(running: Running) -> None:
    """`session.add()` alone is work, and a Core statement alone is work."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        running.database.get_session().add(Note(note="orm"))
        await respond(send, 201)

    await get(DBSessionMiddleware(app, running.database))
    assert running.stored() == ["orm"]


START = {"type": "http.response.start", "status": 200, "headers": []}
PART = {"type": "http.response.body", "body": b"part", "more_body": True}


@pytest.mark.parametrize("ended", ["returned", "cancelled", "WebSocket cancelled"])
async def test_an_object_added_after_a_response_was_cut_short_is_named_in_the_log(
    running: Running, caplog: pytest.LogCaptureFixture, ended: str
) -> None:
    """For example in `finally` of a stream after a disconnect; the log names `begin()`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START if scope["type"] == "http" else {"type": "websocket.accept"})
        if scope["type"] == "http":
            await send(PART)
        try:
            if ended != "returned":
                await asyncio.sleep(60)
        finally:
            running.database.get_session().add(Note("lost"))

    middleware = DBSessionMiddleware(app, running.database)
    exchange = Socket(middleware) if ended.startswith("WebSocket") else Exchange(middleware)
    with anyio.move_on_after(None if ended == "returned" else 0.1):
        await exchange.run()
    (line,) = (each for each in caplog.messages if "cut short: '/'" in each)
    assert "async with database.begin() as session" in line
    assert running.stored() == []
    await running.assert_clean()


@pytest.mark.parametrize("case", ["complete", "set_rollback", "no response", "read", "raised"])
async def test_a_log_line_about_lost_objects_is_no_false_alarm(
    running: Running, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    """Nothing is logged if the work was stored, nothing was changed, or an error is raised."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if case != "no response":
            await send(START)
            await send(PART)
        if case == "read":
            await running.execute(select(Note))
        else:
            running.database.get_session().add(Note("added"))
        if case == "set_rollback":
            set_rollback(True)
        elif case == "raised":
            raise LookupError
        elif case == "complete":
            await send({"type": "http.response.body"})

    await get(DBSessionMiddleware(app, running.database))
    assert not any("cut short" in each for each in caplog.messages)
    assert running.stored() == (["added"] if case == "complete" else [])


async def test_what_was_added_is_seen_by_the_next_statement(running: Running) -> None:
    """SQLAlchemy flushes before each statement, as in any session."""
    seen: list[object] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()
        session.add(Note("added"))
        found = (await running.execute(select(Note))).scalars()
        seen.extend(each.note for each in found)
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, seen) == (200, ["added"])


@pytest.mark.parametrize("status", [200, 400])
async def test_a_session_that_the_application_closes_does_not_lose_its_work_in_silence(
    running: Running, status: int
) -> None:
    """`async with get_session():` would roll back, but a success would be sent."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()
        if isinstance(running.database, SyncDatabase):
            with session:
                await running.write("lost")
        else:
            async with session:
                await running.write("lost")
        await respond(send, status)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.messages == []
    assert isinstance(exchange.error, PrematureClose)
    assert "async with session:" in str(exchange.error)
    assert running.stored() == []


@pytest.mark.parametrize("how", ["close", "with"])
@pytest.mark.parametrize("status", [201, 400])
async def test_a_close_while_an_exception_is_handled_loses_no_work_in_silence(
    running: Running, how: str, status: int
) -> None:
    """An exception handler writes a row and closes: the exception has not interrupted this work."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            raise LookupError
        except LookupError:
            if how == "close":
                await running.write("lost")
                await close_here(running)
            else:
                with blocking(running.database.get_session()):
                    await running.write("lost")
        await respond(send, status)

    if how == "with" and not running.real.is_sync:
        pytest.skip("`async with` knows if an exception has left its block")
    answered: list[Exception] = []
    middleware = DBSessionMiddleware(app, running.database, on_commit_error=answered.append)
    exchange = await get(middleware)
    if status == 400 and how == "close":
        assert (exchange.status, exchange.error) == (400, None)
    else:
        assert exchange.messages == []
        assert isinstance(exchange.error, PrematureClose)
    assert answered == []
    assert running.stored() == []
    await running.assert_clean()


async def test_an_invalidated_session_does_not_lose_its_work_in_silence(running: Running) -> None:
    """`invalidate()` closes the connection, which rolls back what the request has written."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        session: Any = running.database.get_session()
        if running.real.is_sync:
            await to_thread.run_sync(session.invalidate)
        else:
            await session.invalidate()
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.messages == []
    assert isinstance(exchange.error, PrematureClose)
    assert running.stored() == []
    await running.assert_clean()


@pytest.mark.parametrize("block", ["savepoint", "join"])
async def test_a_savepoint_after_such_a_close_does_not_hide_the_loss(
    running: Running, block: str
) -> None:
    """The release of a savepoint is no commit of the application, which would accept the loss."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        try:
            raise LookupError
        except LookupError:
            await close_here(running)
        session: Any = running.database.get_session()
        opened: Any = (
            session.begin_nested() if block == "savepoint" else running.database.begin(join=True)
        )
        if running.real.is_sync:
            with opened:
                await running.write("not alone")
        else:
            async with opened:
                await running.write("not alone")
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.messages == []
    assert isinstance(exchange.error, PrematureClose)
    assert running.stored() == []


@pytest.mark.parametrize("when", ["before", "inside", "after a refused write"])
async def test_the_end_of_a_block_that_may_only_read_does_not_hide_the_loss(
    running: Running, when: str
) -> None:
    """After the block the session may write again, but the lost work stays lost."""

    async def close_after_error(at: tuple[str, ...]) -> None:
        try:
            if when in at:
                raise LookupError
        except LookupError:
            await close_here(running)

    async def read() -> None:
        await running.execute(select(ENTRY))
        if when == "after a refused write":
            with suppress(ForbiddenWrite):
                await running.write("refused")
        await close_after_error(("inside", "after a refused write"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        await close_after_error(("before",))
        opened: Any = running.database.begin(join=True, read_only=True)
        with suppress(ForbiddenWrite):
            if running.real.is_sync:
                with opened:
                    await read()
            else:
                async with opened:
                    await read()
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.messages == []
    assert isinstance(exchange.error, PrematureClose)
    assert running.stored() == []


@pytest.mark.parametrize("real", ["sqlite", "asyncpg", "pymysql-sync"], indirect=True)
async def test_a_failed_commit_of_the_application_does_not_hide_the_loss(running: Running) -> None:
    """Only a COMMIT that succeeds accepts the loss."""
    with running.real.reader.begin() as connection:
        connection.execute(ENTRY.insert().values(note="taken"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        try:
            raise LookupError
        except LookupError:
            await close_here(running)
        running.database.get_session().add(Note("taken"))
        with pytest.raises(IntegrityError):
            await running.call("commit")
        await running.call("rollback")
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.messages == []
    assert isinstance(exchange.error, PrematureClose)
    assert running.stored() == ["taken"]


async def close_here(running: Running) -> None:
    """Close in the thread that handles the exception; in another thread there is no exception."""
    session: Any = running.database.get_session()
    closing = session.close()
    if closing is not None:
        await closing


def blocking(session: Any) -> Any:
    """Return a session of a `SyncDatabase`, which works in `with`."""
    return session


@pytest.mark.parametrize("how", ["read", "with", "commit"])
async def test_a_close_after_an_error_is_no_loss_if_nothing_is_lost_by_mistake(
    running: Running, how: str
) -> None:
    """The session has only read, or the block failed, or the application commits by itself."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()
        try:
            if how == "with":
                await fail_in_block(running, session)
            else:
                await running.execute(select(ENTRY))
                if how == "commit":
                    await running.write("undone")
                raise LookupError
        except LookupError:
            if how != "with":
                await close_here(running)
        if how == "commit":
            await running.write("kept")
            await running.call("commit")
        await respond(send)

    if how == "read" and running.real.is_mariadb:
        pytest.skip("its reads are in a transaction, like writes")
    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (200, None)
    assert running.stored() == (["kept"] if how == "commit" else [])
    await running.assert_clean()


async def test_a_block_that_fails_loses_no_earlier_work_in_silence(running: Running) -> None:
    """`with session:` rolls back also what the request has written before the block."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        with suppress(LookupError):
            await fail_in_block(running, running.database.get_session())
        await respond(send, 201)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert exchange.messages == []
    assert isinstance(exchange.error, PrematureClose)
    assert running.stored() == []


async def fail_in_block(running: Running, session: Any) -> None:
    """Leave a block of the session by an exception.

    Raises:
        LookupError: Always.
    """
    if running.real.is_sync:
        with session:
            await running.write("undone")
            raise LookupError
    async with session:
        await running.write("undone")
        raise LookupError


async def test_a_close_never_takes_the_place_of_an_exception(running: Running) -> None:
    """The server gets the exception of the application."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("undone")
        try:
            raise LookupError
        finally:
            await close_here(running)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert isinstance(exchange.error, LookupError)
    assert running.stored() == []
    await running.assert_clean()


async def test_a_session_without_work_may_be_closed_and_used_again(running: Running) -> None:
    """`close()` releases nothing that `commit()` has not released already."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.call("close")
        await running.write("kept")
        await running.call("commit")
        await running.call("close")
        await running.write("kept too")
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error) == (200, None)
    assert running.stored() == ["kept", "kept too"]


@pytest.mark.parametrize("real", ["sqlite", "psycopg-sync"], indirect=True)
async def test_a_session_that_is_closed_lets_go_of_its_objects(running: Running) -> None:
    """Loaded objects belong to no session any more, and the next statement loads them again."""
    kept: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()
        note = Note("kept")
        session.add(note)
        await running.call("commit")
        await running.call("close")
        kept.append(note in session)
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error, kept) == (200, None, [False])


@pytest.mark.parametrize("real", ["sqlite"], indirect=True)
async def test_an_object_added_in_a_thread_to_a_session_of_tasks_is_refused(
    running: Running,
) -> None:
    """The error names the class to use in `def` handlers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session: Any = running.database.get_session()
        with pytest.raises(ConfigurationError, match="SyncDatabase"):
            await to_thread.run_sync(session.add, Note("refused"))
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert (exchange.status, exchange.error, running.stored()) == (200, None, [])


@pytest.mark.parametrize("real", ["sqlite-sync"], indirect=True)
async def test_no_exception_of_a_signal_handler_is_lost_when_a_failure_is_forgotten(
    real: Real,
) -> None:
    """Python ignores exceptions of Python code that runs when an object is freed."""
    database: Any = real.describe()
    others = list(failures.failed_transactions)  # other tests may have left some that are alive
    with database:
        with database.begin() as session:
            with suppress(DBAPIError):
                session.execute(WRONG)
            (failed,) = (each for each in failures.failed_transactions if each not in others)
            assert isinstance(failed.__callback__, BuiltinMethodType)
        assert all(each in others for each in failures.failed_transactions)


async def test_with_a_listener_on_the_class_failures_are_recorded_once(tmp_path: Any) -> None:
    """Each new engine would add one more listener to the class, and each failure call all."""
    calls: list[Any] = []

    def record(context: Any) -> None:
        calls.append(context)

    event.listen(Engine, "handle_error", record)
    try:
        for number in range(3):
            database = SyncDatabase(f"sqlite:///{tmp_path}/{number}.db")
            with database:
                listeners = list(database.engine.dialect.dispatch.handle_error)
                assert listeners[0] is failures._record_failure
                assert listeners.count(failures._record_failure) == 1
                with suppress(DBAPIError), database.begin() as session:
                    session.execute(WRONG)
        assert len(calls) == 3
    finally:
        event.remove(Engine, "handle_error", record)
