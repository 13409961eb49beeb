"""Tests `begin(join=True)`, which joins the outer unit of work or opens a new one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from asgi import get, respond
from conftest import ENTRY, WITH_MARIADB, Running
from pages import Page
from several import several_databases
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from asgi_dbsession import (
    AsyncDatabase,
    ConcurrentUse,
    ConfigurationError,
    DBSessionMiddleware,
    SessionClosed,
    SyncDatabase,
    TransactionAborted,
    get_session,
    get_sync_session,
    on_commit,
    set_rollback,
)
from asgi_dbsession.testing import rolled_back

pytestmark = pytest.mark.anyio

KINDS = WITH_MARIADB
ASYNC = pytest.mark.parametrize("real", ["sqlite", "asyncpg", "psycopg"], indirect=True)
SYNC = pytest.mark.parametrize("real", ["sqlite-sync", "psycopg-sync"], indirect=True)
SLOW = pytest.mark.parametrize("real", ["asyncpg", "psycopg"], indirect=True)

Work = Callable[[Session], object]


class Refused(Exception):
    """The exception of a service function."""


def writing(note: str) -> Work:
    """Store a row."""
    return lambda session: session.execute(ENTRY.insert().values(note=note))


def failing(note: str) -> Work:
    """Store a row, and raise."""

    def write_then_raise(session: Session) -> None:
        writing(note)(session)
        raise Refused

    return write_then_raise


def write_and_set_rollback(session: Session) -> None:
    """Roll back all work of the request."""
    writing("joined")(session)
    set_rollback(True)


def write_and_commit(session: Session) -> None:
    """Store a row in a new unit of work."""
    writing("too")(session)
    session.commit()


async def in_block(running: Running, work: Work, *, join: bool = True) -> None:
    """Call a service function in `begin(join=True)`, in a thread if the database blocks."""
    database = running.database
    if isinstance(database, AsyncDatabase):
        async with database.begin(join=join) as session:
            await session.run_sync(work)
        return

    def in_thread() -> None:
        with database.begin(join=join) as session:
            work(session)

    await to_thread.run_sync(in_thread)


async def serve(running: Running, handler: Any, status: int = 200, **options: Any) -> Any:
    """Serve one request with a handler without parameters."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await handler()
        await respond(send, status)

    return await get(DBSessionMiddleware(app, running.database, **options))


# Inside of a unit of work


async def test_an_error_rolls_back_to_the_savepoint_and_rises(running: Running) -> None:
    """Earlier and later work of the request is stored."""

    async def handler() -> None:
        await running.write("before")
        with pytest.raises(Refused):
            await in_block(running, failing("lost"))
        await running.write("after")

    assert (await serve(running, handler)).status == 200
    assert running.stored() == ["before", "after"]


@pytest.mark.parametrize("is_first", [True, False])
async def test_what_joined_is_rolled_back_with_the_outer_unit(
    running: Running, *, is_first: bool
) -> None:
    """A successful block commits nothing itself, even if it is the first to do any work."""

    async def handler() -> None:
        if not is_first:
            await running.execute(select(ENTRY))
        await in_block(running, writing("joined"))

    assert (await serve(running, handler, 409)).status == 409
    assert running.stored() == []
    await serve(running, handler)
    assert running.stored() == ["joined"]


async def test_a_block_in_a_block_has_a_savepoint_of_its_own(running: Running) -> None:
    """The inner block is rolled back alone, or together with the outer block."""
    outer = nested_sync if running.real.is_sync else nested_async

    async def handler() -> None:
        with pytest.raises(Refused):
            await outer(running, fails=True)
        await outer(running, fails=False)

    assert (await serve(running, handler)).status == 200
    assert running.stored() == ["outer False", "inner False"]


async def nested_async(running: Running, *, fails: bool) -> None:
    database: Any = running.database
    async with database.begin(join=True):
        await running.write(f"outer {fails}")
        with suppress(Refused):
            await in_block(running, failing("inner, lost"))
        await in_block(running, writing(f"inner {fails}"))
        if fails:
            raise Refused


async def nested_sync(running: Running, *, fails: bool) -> None:
    database: Any = running.database

    def outer(session: Session) -> None:
        writing(f"outer {fails}")(session)
        with suppress(Refused), database.begin(join=True):
            failing("inner, lost")(session)
        with database.begin(join=True):
            writing(f"inner {fails}")(session)
        if fails:
            raise Refused

    await in_block(running, outer)


async def test_on_commit_follows_the_outer_commit_and_is_dropped_with_the_savepoint(
    running: Running,
) -> None:
    """No function is called while the work can still be rolled back."""
    called: list[Any] = []

    def follow(name: str) -> Work:
        def work(session: Session) -> None:
            writing(name)(session)
            on_commit(lambda: called.append((name, running.stored())))
            if name == "lost":
                raise Refused

        return work

    async def handler() -> None:
        with pytest.raises(Refused):
            await in_block(running, follow("lost"))
        await in_block(running, follow("kept"))
        assert called == []
        await running.write("later")

    await serve(running, handler)
    assert called == [("kept", ["kept", "later"])]


async def test_set_rollback_inside_is_the_outer_units(running: Running) -> None:
    """It decides about all work of the request, for any status."""

    async def handler() -> None:
        await running.write("before")
        await in_block(running, write_and_set_rollback)

    assert (await serve(running, handler)).status == 200
    assert running.stored() == []


async def test_a_joined_block_reports_nothing_of_its_own(running: Running) -> None:
    """Its statements count for the unit that it joined."""
    reports: list[Any] = []
    await serve(running, lambda: in_block(running, writing("joined")), on_report=reports.append)
    (report,) = reports
    assert (report.outcome, report.reason) == ("committed", None)


async def test_begin_in_a_joined_block_is_a_unit_of_its_own(running: Running) -> None:
    """The stored work survives the rollback of the block and of the request."""
    if running.real.is_sqlite:
        pytest.skip("SQLite has one writer at a time")

    database: Any = running.database

    async def handler() -> None:
        if running.real.is_sync:
            await in_block(running, lambda _: audit(database))
        else:
            async with database.begin(join=True), database.begin() as session:
                await session.execute(ENTRY.insert().values(note="audit"))
        await running.write("lost")

    await serve(running, handler, 500)
    assert running.stored() == ["audit"]


def audit(database: Any) -> None:
    with database.begin() as session:
        writing("audit")(session)


# Outside of a unit of work


async def test_outside_of_a_unit_it_opens_one(running: Running) -> None:
    """A worker, a script or a test calls the same function, and the function commits."""
    called: list[Any] = []

    def work(session: Session) -> None:
        writing("stored")(session)
        on_commit(lambda: called.append(running.stored()))

    await in_block(running, work)
    assert called == [["stored"]]
    with pytest.raises(Refused):
        await in_block(running, failing("lost"))
    assert running.stored() == ["stored"]


@ASYNC
async def test_a_task_that_outlives_its_request_opens_one(running: Running) -> None:
    """A closed unit is not joined."""
    go_on = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def later() -> None:
        await go_on.wait()
        await in_block(running, writing("later"))

    async def handler() -> None:
        await running.write("request")
        tasks.append(asyncio.create_task(later()))

    await serve(running, handler)
    go_on.set()
    await tasks[0]
    assert running.stored() == ["request", "later"]


@ASYNC
async def test_it_joins_begin_too(running: Running) -> None:
    """A block joins the `begin()` of a worker too."""
    database: Any = running.database
    with pytest.raises(Refused):
        async with database.begin() as session:
            async with database.begin(join=True) as joined:
                assert joined is session
                await running.write("lost")
            raise Refused
    assert running.stored() == []


@ASYNC
async def test_get_session_means_the_database_inside_and_outside(
    running: Running, tmp_path: Path
) -> None:
    """A function finds the same default session wherever it is called."""
    other = AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path}/other.db")

    async def service() -> None:
        async with other.begin(join=True) as session:
            assert get_session() is session
            assert other.get_session() is session

    async def handler() -> None:
        default = get_session()
        await service()
        assert get_session() is default
        database: Any = running.database
        async with database.begin() as own:
            await service()
            assert get_session() is own
            async with other.begin(join=True):
                assert database.get_session() is own

    async with other:
        await service()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await handler()
            await respond(send)

        exchange = await get(DBSessionMiddleware(app, running.database, other))
    assert (exchange.status, exchange.error) == (200, None)


async def test_on_commit_belongs_to_the_unit_that_was_joined(tmp_path: Path) -> None:
    """The block does not join a unit of another database in between."""
    async with several_databases("asyncpg + sqlite", tmp_path) as several:
        shop, reports = several.each
        called: list[str] = []

        async def handler() -> None:
            database: Any = reports.database
            async with database.begin():
                await in_block(shop, lambda _: on_commit(lambda: called.append("shop")))
            assert called == []
            await shop.write("kept")

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await handler()
            await respond(send)

        await get(DBSessionMiddleware(app, *several.databases))
        assert called == ["shop"]
        assert several.stored() == [["kept"], []]


@pytest.mark.parametrize("kinds", ["asyncpg + sqlite", "psycopg-sync + asyncmy"])
async def test_a_block_on_one_database_leaves_the_other_alone(kinds: str, tmp_path: Path) -> None:
    """Each database has its own savepoint; COMMIT is for all databases."""
    async with several_databases(kinds, tmp_path) as several:
        first, second = several.each

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await second.write("kept")
            with pytest.raises(Refused):
                await in_block(first, failing("lost"))
            await in_block(first, writing("joined"))
            await respond(send)

        await get(DBSessionMiddleware(app, *several.databases))
        assert several.stored() == [["joined"], ["kept"]]


async def test_two_phases_know_savepoints_too(tmp_path: Path) -> None:
    """The work of the block is prepared and committed together with the rest."""
    async with several_databases("asyncpg + asyncmy", tmp_path) as several:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            for each in several.each:
                with pytest.raises(Refused):
                    await in_block(each, failing("lost"))
                await in_block(each, writing("joined"))
            await respond(send)

        exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
        assert exchange.error is None
        assert several.stored() == [["joined"], ["joined"]]


async def test_inside_of_rolled_back_it_is_the_same(running: Running) -> None:
    """Inside `rolled_back`, blocks join, fail and commit as usual."""
    async with rolled_back(running.database):

        async def handler() -> None:
            with pytest.raises(Refused):
                await in_block(running, failing("lost"))
            await in_block(running, writing("joined"))

        assert (await serve(running, handler)).status == 200
        await in_block(running, writing("own"))
        notes: list[Any] = []
        await in_block(running, lambda session: notes.extend(session.scalars(select(ENTRY.c.note))))
        assert sorted(notes) == ["joined", "own"]
    assert running.stored() == []


# Several tasks


@ASYNC
async def test_a_second_task_cannot_open_a_block_meanwhile(running: Running) -> None:
    """Otherwise the end of one block would keep or roll back work of the other block."""
    database: Any = running.database
    entered, leave = asyncio.Event(), asyncio.Event()
    errors: list[BaseException] = []

    async def first() -> None:
        async with database.begin(join=True):
            await running.write("first")
            entered.set()
            await leave.wait()

    async def second() -> None:
        await entered.wait()
        for attempt in (
            in_block(running, writing("second")),
            running.write("second"),
            running.call("flush"),
        ):
            try:
                await attempt
            except ConcurrentUse as error:
                errors.append(error)
        leave.set()

    async def handler() -> None:
        await asyncio.gather(first(), second())
        await in_block(running, writing("afterwards"))

    assert (await serve(running, handler)).status == 200
    assert len(errors) == 3
    assert "database.begin()` in each task" in str(errors[0])
    assert running.stored() == ["first", "afterwards"]


@SYNC
async def test_a_second_thread_cannot_use_the_session_meanwhile(running: Running) -> None:
    """`def` handlers in threads get the same error."""
    database: Any = running.database
    entered, leave = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def first() -> None:
        with database.begin(join=True) as session:
            writing("first")(session)
            loop.call_soon_threadsafe(entered.set)
            asyncio.run_coroutine_threadsafe(leave.wait(), loop).result()

    async def handler() -> None:
        database.get_session()
        thread = asyncio.create_task(asyncio.to_thread(first))
        await entered.wait()
        with pytest.raises(ConcurrentUse):
            await in_block(running, writing("second"))
        with pytest.raises(ConcurrentUse):
            await running.write("second")
        leave.set()
        await thread

    assert (await serve(running, handler)).status == 200
    assert running.stored() == ["first"]


@ASYNC
async def test_tasks_that_the_block_waits_for_work_inside_of_it(running: Running) -> None:
    """Tasks that run one after the other may use the block."""
    database: Any = running.database

    async def handler() -> None:
        with pytest.raises(Refused):
            async with database.begin(join=True):
                await asyncio.create_task(running.write("lost"))
                await asyncio.create_task(in_block(running, writing("lost too")))
                raise Refused
        async with database.begin(join=True):
            await asyncio.wait_for(running.write("kept"), 10)

    assert (await serve(running, handler)).status == 200
    assert running.stored() == ["kept"]


@SLOW
async def test_the_end_of_a_block_waits_for_the_operation_in_flight(running: Running) -> None:
    """A task that outlives a failed block takes no work with it, and leaves no work behind."""
    database: Any = running.database
    tasks: list[asyncio.Task[Any]] = []
    insert = "INSERT INTO entry (note) SELECT 'lost' FROM pg_sleep(0.1)"

    async def stray() -> None:
        await running.execute(text(insert))
        await asyncio.sleep(0.01)
        await running.write("never")

    async def handler() -> None:
        with pytest.raises(Refused):
            async with database.begin(join=True):
                await running.execute(select(ENTRY))
                tasks.append(asyncio.create_task(stray()))
                await asyncio.sleep(0.05)
                raise Refused
        with pytest.raises(SessionClosed, match=r"open `database.begin\(\)` in the task"):
            await tasks[0]
        await running.write("kept")

    assert (await serve(running, handler)).status == 200
    assert running.stored() == ["kept"]


@ASYNC
async def test_a_block_does_not_end_well_around_one_that_goes_on(running: Running) -> None:
    """Otherwise half of the work of the other block would be kept."""
    database: Any = running.database
    go_on = asyncio.Event()
    entered = asyncio.Event()
    tasks: list[asyncio.Task[Any]] = []

    async def stray() -> None:
        async with database.begin(join=True):
            await running.write("half")
            entered.set()
            await go_on.wait()

    async def handler() -> None:
        with pytest.raises(ConcurrentUse):
            async with database.begin(join=True):
                tasks.append(asyncio.create_task(stray()))
                await entered.wait()
        go_on.set()
        with pytest.raises(SessionClosed):
            await tasks[0]
        await running.write("kept")

    assert (await serve(running, handler)).status == 200
    assert running.stored() == ["kept"]


@ASYNC
async def test_a_cancelled_block_is_rolled_back_and_the_request_goes_on(running: Running) -> None:
    """A cancel scope cancels again at every await, also while the block rolls back."""
    database: Any = running.database

    async def handler() -> None:
        await running.write("before")
        with anyio.CancelScope() as scope:
            async with database.begin(join=True):
                await running.write("lost")
                scope.cancel()
                await anyio.sleep(10)
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as limit, database.begin(join=True):
                await running.write("lost")
                limit.reschedule(0)
                await anyio.sleep(10)
        await running.write("after")

    assert (await serve(running, handler)).status == 200
    assert running.stored() == ["before", "after"]


# Errors inside of a block


async def test_a_statement_that_failed_inside_takes_only_the_block_with_it(
    running: Running,
) -> None:
    """A get-or-create function catches the error of its INSERT, and continues."""

    async def handler() -> None:
        await running.write("kept")
        with pytest.raises(IntegrityError):
            await in_block(running, writing("kept"))
        await running.write("after")

    assert (await serve(running, handler)).status == 200
    assert running.stored() == ["kept", "after"]


@pytest.mark.parametrize("real", ["asyncmy", "pymysql-sync"], indirect=True)
async def test_a_deadlock_inside_is_not_hidden_by_the_block(running: Running) -> None:
    """MariaDB rolls back everything, savepoints included, so COMMIT is refused."""

    def deadlock(session: Session) -> None:
        refuse = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'lost'"
        session.connection().exec_driver_sql("ROLLBACK")  # as the server does it
        session.execute(text(refuse))

    async def handler() -> None:
        await running.write("before")
        with pytest.raises(Exception, match="lost"):
            await in_block(running, deadlock)
        await running.write("half")

    exchange = await serve(running, handler)
    assert isinstance(exchange.error, TransactionAborted)
    assert running.stored() == []


@pytest.mark.parametrize("real", ["psycopg-sync", "sqlite-sync", "pymysql-sync"], indirect=True)
async def test_a_savepoint_that_is_gone_lets_nothing_be_committed(running: Running) -> None:
    """If the block cannot be rolled back alone, the outer COMMIT is refused."""

    def lose_savepoint(session: Session) -> None:
        writing("lost")(session)
        savepoint: Any = session.connection().get_nested_transaction()
        name = savepoint._savepoint
        session.connection().exec_driver_sql(f"RELEASE SAVEPOINT {name}")
        raise Refused

    async def handler() -> None:
        await running.write("before")
        with pytest.raises(Refused):
            await in_block(running, lose_savepoint)
        with suppress(Exception):
            await running.write("after")

    exchange = await serve(running, handler)
    assert isinstance(exchange.error, TransactionAborted)
    assert running.stored() == []


async def test_commit_inside_ends_the_outer_transaction(running: Running) -> None:
    """A `commit()` in the block works as in a request; later work can still be rolled back."""

    def commit_then_fail(session: Session) -> None:
        writing("committed")(session)
        session.commit()
        failing("lost")(session)

    async def handler() -> None:
        with pytest.raises(Refused):
            await in_block(running, commit_then_fail)
        await in_block(running, write_and_commit)

    assert (await serve(running, handler)).status == 200
    assert running.stored() == ["committed", "too"]


@pytest.mark.parametrize("real", ["sqlite", "sqlite-sync"], indirect=True)
async def test_a_savepoint_of_sqlite_is_inside_of_a_transaction(running: Running) -> None:
    """Otherwise its release would store work that a status of 400 and above should roll back."""

    def nested(session: Session) -> None:
        with session.begin_nested():
            writing("nested")(session)

    async def handler() -> None:
        session: Any = running.database.get_session()
        if running.real.is_sync:
            await to_thread.run_sync(nested, session)
        else:
            await session.run_sync(nested)

    await serve(running, handler, 500)
    assert running.stored() == []
    await serve(running, handler)
    assert running.stored() == ["nested"]


# As a decorator


@ASYNC
async def test_it_decorates_coroutine_functions(running: Running) -> None:
    """Each call joins or opens a unit, and returns the result of the function."""
    database: Any = running.database

    @database.begin(join=True)  # type: ignore[untyped-decorator]
    async def place(note: str, *, fails: bool = False) -> str:
        await get_session().execute(ENTRY.insert().values(note=note))
        if fails:
            raise Refused
        return note

    async def handler() -> None:
        assert await place("joined") == "joined"
        with pytest.raises(Refused):
            await place("lost", fails=True)
        assert running.stored() == []

    await serve(running, handler)
    assert await place("own") == "own"
    assert running.stored() == ["joined", "own"]


@SYNC
def test_it_decorates_plain_functions(real: Any) -> None:
    """It works for `def` functions in a script without an event loop too."""
    database = SyncDatabase.from_engine(real.reader)

    @database.begin(join=True)
    def place(note: str, *, fails: bool = False) -> str:
        writing(note)(get_sync_session())
        if fails:
            raise Refused
        return note

    with database.begin():
        assert place("joined") == "joined"
        with suppress(Refused):
            place("lost", fails=True)
        assert real.stored() == []
    assert place("own") == "own"
    assert real.stored() == ["joined", "own"]


async def coroutine_function() -> None: ...


def generator_function() -> Iterator[int]:
    yield 1


async def asynchronous_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    "function", [coroutine_function, generator_function, asynchronous_generator]
)
def test_it_refuses_to_decorate_what_runs_later(function: Any) -> None:
    """Otherwise the block would end before the function has run, without an error."""
    database = SyncDatabase("sqlite://")
    with pytest.raises(ConfigurationError, match=f"{function.__name__}.*inside of the function"):
        database.begin()(function)


def plain_function() -> None: ...


@pytest.mark.parametrize("function", [plain_function, generator_function, asynchronous_generator])
def test_an_async_database_decorates_coroutine_functions_alone(function: Any) -> None:
    """A `def` function would turn into a coroutine that its callers never await."""
    database: Any = AsyncDatabase("sqlite+aiosqlite://")
    with pytest.raises(ConfigurationError, match=f"{function.__name__}.*with `async def`"):
        database.begin()(function)
    assert asyncio.iscoroutinefunction(database.begin()(partial(coroutine_function)))


# What the page says about Spring and Django, row by row


@pytest.mark.parametrize("error", [Refused, KeyboardInterrupt, asyncio.CancelledError])
async def test_every_exception_rolls_the_block_back(
    running: Running, error: type[BaseException]
) -> None:
    """A caught exception of any kind takes the work of the block with it."""

    def write_then_raise(session: Session) -> None:
        writing("lost")(session)
        raise error

    database: Any = running.database

    async def handler() -> None:
        await running.write("kept")
        with pytest.raises(error):
            if isinstance(database, AsyncDatabase):
                async with database.begin(join=True):
                    await running.write("lost")
                    raise error
            else:
                await in_block(running, write_then_raise)

    assert (await serve(running, handler)).status == 200
    assert running.stored() == ["kept"]


async def test_functions_of_one_module_join_each_other(running: Running) -> None:
    """A decorated function that calls itself has a savepoint for each call."""
    database: Any = running.database

    if isinstance(database, SyncDatabase):

        @database.begin(join=True)
        def write_deeper(depth: int) -> None:
            writing(f"depth {depth}")(database.get_session())
            if depth == 0:
                raise Refused
            with suppress(Refused):
                write_deeper(depth - 1)

        async def handler() -> None:
            await to_thread.run_sync(write_deeper, 2)

    else:
        assert isinstance(database, AsyncDatabase)

        @database.begin(join=True)
        async def write_deeper_async(depth: int) -> None:
            await running.write(f"depth {depth}")
            if depth == 0:
                raise Refused
            with suppress(Refused):
                await write_deeper_async(depth - 1)

        async def handler() -> None:
            await write_deeper_async(2)

    assert (await serve(running, handler)).status == 200
    assert running.stored() == ["depth 2", "depth 1"]


ROWS = {
    "no transaction around it": test_outside_of_a_unit_it_opens_one,
    "a transaction around it": test_what_joined_is_rolled_back_with_the_outer_unit,
    "the inner function raises, the caller catches": (
        test_an_error_rolls_back_to_the_savepoint_and_rises
    ),
    "which exceptions roll back": test_every_exception_rolls_the_block_back,
    "what runs after COMMIT": (
        test_on_commit_follows_the_outer_commit_and_is_dropped_with_the_savepoint
    ),
    '"roll back", said inside': test_set_rollback_inside_is_the_outer_units,
    "`commit()` inside": test_commit_inside_ends_the_outer_transaction,
    "a transaction of its own": test_begin_in_a_joined_block_is_a_unit_of_its_own,
    "another task or thread": test_a_second_task_cannot_open_a_block_meanwhile,
    "calls within one class or module": test_functions_of_one_module_join_each_other,
}


def test_each_row_of_the_comparison_has_a_test() -> None:
    """A row without one must say that there is no such thing here."""
    page = Page("docs/how-to/services.md").text.partition("## Compared with Spring and Django")[2]
    cells = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    rows = {first.removeprefix("| "): ours for first, ours, *_ in cells}
    assert {name for name, ours in rows.items() if ours != "not available"} == set(ROWS)
