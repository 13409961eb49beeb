"""A request that may only read stores nothing, and fails loudly if it tries to write."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from anyio import CancelScope, to_thread
from asgi import Exchange, Socket, get, respond
from conftest import ENTRY, METADATA, SQLALCHEMY, WITH_MARIADB, Real, Running, checked_out
from several import Entry as SeveralEntry, several_databases
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session
from sqlalchemy.pool import StaticPool

from asgi_dbsession import (
    ConfigurationError,
    DBSessionMiddleware,
    ForbiddenWrite,
    SyncDatabase,
    UnitReport,
    on_commit,
    safe_methods,
    set_rollback,
)
from asgi_dbsession.session.optional.read_only.transaction import is_refusal
from asgi_dbsession.testing import count_statements, rolled_back

pytestmark = pytest.mark.anyio
KINDS = WITH_MARIADB


class Base(DeclarativeBase):
    """Maps the tables of the tests."""

    metadata = METADATA


class Entry(Base):
    """A row."""

    __table__ = ENTRY
    id: Mapped[int]
    note: Mapped[str]


def first(session: Session) -> Entry:
    """Load an object."""
    return session.scalars(select(Entry).order_by(Entry.note.desc()).limit(1)).one()


def add(session: Session) -> None:
    """Add an object."""
    session.add(Entry(note="new"))


def change(session: Session) -> None:
    """Change an object that was loaded."""
    first(session).note = "changed"


def remove(session: Session) -> None:
    """Delete an object that was loaded."""
    session.delete(first(session))


def flushed(work: Callable[[Session], Any]) -> Callable[[Session], Any]:
    """Flush afterwards."""

    def work_and_flush(session: Session) -> None:
        work(session)
        session.flush()

    return work_and_flush


def execute(statement: Any, *args: Any) -> Callable[[Session], Any]:
    """Execute a statement."""
    return lambda session: session.execute(statement, *args)


def read_first(session: Session) -> None:
    """Write after a plain read, at which no transaction has begun."""
    first(session)
    session.execute(text("UPDATE entry SET note = 'changed'"))


UNFLUSHED = {"a new object": add, "a changed object": change, "a deleted object": remove}
INSERT = ENTRY.insert().values(note="new")
WRITES: dict[str, Callable[[Session], Any]] = {
    **{name: flushed(work) for name, work in UNFLUSHED.items()},
    "an INSERT": execute(INSERT),
    "an UPDATE": execute(ENTRY.update().values(note="new")),
    "a DELETE": execute(ENTRY.delete()),
    "an INSERT by the ORM": execute(insert(Entry), [{"note": "new"}]),
    "a bulk INSERT": lambda session: session.bulk_insert_mappings(
        Entry.__mapper__, [{"note": "new"}]
    ),
    "text": execute(text("INSERT INTO entry (note) VALUES ('new')")),
    "the connection": lambda session: session.connection().execute(INSERT),
    "text after a read": read_first,
}


# One write that the flush refuses, one that the session refuses, and two that the database refuses.
OF_EACH_KIND = ("a changed object", "an INSERT", "text", "the connection")


async def on_session(running: Running, work: Callable[[Session], Any]) -> Any:
    """Run a function with the session of the request, for each kind of database."""
    if isinstance(running.database, SyncDatabase):
        return await to_thread.run_sync(lambda: work(running.database.get_session()))
    return await running.database.get_session().run_sync(work)


def kept(real: Real) -> list[str]:
    """Store the row that no request may change."""
    with real.reader.begin() as connection:
        connection.execute(ENTRY.insert().values(note="kept"))
    return ["kept"]


async def serve(running: Running, work: Any, method: str = "GET", **options: Any) -> Exchange:
    """Do something in a request; GET may only read."""
    status = options.pop("status", 200)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await work()
        await respond(send, status)

    options.setdefault("read_only", safe_methods)
    return await get(DBSessionMiddleware(app, running.database, **options), method=method)


@pytest.mark.parametrize("name", WRITES)
async def test_a_write_is_refused_and_stores_nothing(running: Running, name: str) -> None:
    """The server gets the error, even if the application has caught it."""
    before, raised = kept(running.real), []

    async def work() -> None:
        with pytest.raises((ForbiddenWrite, DBAPIError)) as caught:
            await on_session(running, WRITES[name])
        raised.append(caught.value)
        if swallowed:
            await running.call("rollback")
        else:
            raise caught.value

    for swallowed in (True, False):
        exchange = await serve(running, work)
        assert exchange.messages == []
        error = raised.pop()
        if swallowed:
            assert type(exchange.error) is ForbiddenWrite
            # The message names the object or the statement.
            assert re.search(r"Entry|statement [A-Z]{6}|bulk_insert", str(exchange.error))
        else:
            assert exchange.error is error
        said = " ".join((str(error), *getattr(error, "__notes__", ())))
        assert "database.begin()" in said
        assert running.stored() == before


@pytest.mark.parametrize("real", ["sqlite"], indirect=True)
async def test_a_write_with_parameters_is_refused_on_a_shared_connection(real: Real) -> None:
    """SQLite cannot refuse it there: it would refuse the writes of other sessions too."""
    async with real.describe(poolclass=StaticPool) as database:
        running = Running(real, database)

        async def work() -> None:
            await on_session(running, WRITES["an INSERT by the ORM"])

        exchange = await serve(running, work)
        assert isinstance(exchange.error, ForbiddenWrite)
        assert (exchange.messages, running.stored()) == ([], [])


BULK = {
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(Entry, [{"note": "new"}]),
    "bulk_save_objects": lambda session: session.bulk_save_objects([Entry(note="new")]),
    "bulk_update_mappings": lambda session: session.bulk_update_mappings(
        Entry, [{"id": first(session).id, "note": "new"}]
    ),
}


@pytest.mark.parametrize("name", BULK)
async def test_bulk_operations_are_refused_only_where_a_request_may_only_read(
    running: Running, name: str
) -> None:
    """The error names the method, and the statement does not reach the database."""
    before = kept(running.real)

    async def work() -> None:
        await on_session(running, BULK[name])

    exchange = await serve(running, work)
    assert isinstance(exchange.error, ForbiddenWrite)
    assert f"`{name}()`" in str(exchange.error)
    assert running.stored() == before
    assert (await serve(running, work, "POST")).status == 200
    assert running.stored()[-1] == "new"


@pytest.mark.parametrize(
    ("attributes", "arguments", "refused"),
    [
        ({"pgcode": "25006"}, (), True),  # psycopg2
        ({"pgcode": "25001"}, (), False),
        ({}, (1792, "READ ONLY"), True),  # older drivers of MariaDB
        ({}, (1791, "READ ONLY"), False),
        ({"sqlite_errorcode": 8}, ("readonly",), True),
        ({"sqlite_errorcode": 8 | 3 << 8}, ("readonly",), True),  # SQLITE_READONLY_ROLLBACK
        ({"sqlite_errorcode": 9}, ("interrupted",), False),
    ],
)
def test_a_refused_write_is_known_by_the_code_of_each_driver(
    attributes: dict[str, Any], arguments: tuple[Any, ...], *, refused: bool
) -> None:
    """Drivers that give no SQLSTATE give a number."""
    error = Exception(*arguments)
    vars(error).update(attributes)
    assert is_refusal(error) is refused


async def test_an_error_of_a_read_is_not_taken_for_a_refused_write(running: Running) -> None:
    """The application may catch this error, and the request succeeds."""
    wrong = "SELECT zeroblob(2000000000)" if running.real.is_sqlite else "SELECT nonsense"

    async def work() -> None:
        with pytest.raises(DBAPIError) as caught:
            await running.execute(text(wrong))
        assert not hasattr(caught.value, "__notes__")
        await running.call("rollback")

    exchange = await serve(running, work)
    assert (exchange.status, exchange.error) == (200, None)


@pytest.mark.parametrize("name", UNFLUSHED)
async def test_what_was_never_flushed_fails_the_request_too(running: Running, name: str) -> None:
    """For example, a GET handler that clears the password of the shown object."""
    before = kept(running.real)

    lifts = iter((False, True))

    async def work() -> None:
        await on_session(running, UNFLUSHED[name])
        if next(lifts):
            set_rollback(False)

    for _ in range(2):
        exchange = await serve(running, work)
        assert exchange.messages == []
        assert isinstance(exchange.error, ForbiddenWrite)
        assert "Entry" in str(exchange.error)
        assert running.stored() == before


async def test_the_next_request_on_the_connection_may_write(real: Real) -> None:
    """The database refuses writes only in this transaction."""
    async with real.describe(pool_size=1, max_overflow=0) as database:
        running = Running(real, database)

        async def read() -> None:
            await running.execute(select(ENTRY))
            await running.execute(select(func.count(ENTRY.c.id), func.lower("A")))

        async def write() -> None:
            await running.execute(text("INSERT INTO entry (note) VALUES ('new')"))

        for _ in range(2):
            assert (await serve(running, read)).status == 200
            assert (await serve(running, write)).status is None
        assert (await serve(running, write, "POST")).status == 200
        await real.assert_clean(database)
    assert real.stored() == ["new"]


@pytest.mark.skipif(
    SQLALCHEMY < (2, 0, 43),
    reason="SQLAlchemy has the option since 2.0.43",
)
async def test_a_connection_that_is_never_rolled_back_may_write(real: Real) -> None:
    """With AUTOCOMMIT, SQLAlchemy can leave out ROLLBACK; MariaDB would stay read-only."""
    options = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
    async with real.describe(pool_size=1, max_overflow=0, **options) as database:
        running = Running(real, database)

        async def work() -> None:
            await running.execute(text("SELECT 1"))

        assert (await serve(running, work, status=500)).status == 500
        exchange = await serve(running, lambda: running.write("new"), "POST")
        assert (exchange.status, exchange.error) == (200, None)
    assert real.stored() == ["new"]


def begin_by_hand(driver_connection: Any, *_: object) -> None:
    """Begin a transaction when a connection leaves the pool."""
    cursor = driver_connection.cursor()
    cursor.execute("SELECT 1")
    cursor.close()


@pytest.mark.parametrize("real", ["asyncpg", "psycopg", "psycopg-sync"], indirect=True)
async def test_a_transaction_that_a_pool_listener_began_may_only_read_too(real: Real) -> None:
    """The driver has sent BEGIN without READ ONLY already."""
    async with real.describe(pool_events=[(begin_by_hand, "checkout")]) as database:
        running = Running(real, database)
        exchange = await serve(running, lambda: on_session(running, WRITES["text"]))
        assert "may only read" in "".join(getattr(exchange.error, "__notes__", ()))
        assert (await serve(running, lambda: running.execute(select(ENTRY)))).status == 200
        assert (await serve(running, lambda: running.write("new"), "POST")).status == 200
        await real.assert_clean(database)
    assert real.stored() == ["new"]


async def test_begin_inside_of_a_request_that_may_only_read_may_write(running: Running) -> None:
    """`begin()` in the request is a new unit, for example for an audit row."""

    async def work() -> None:
        await running.execute(select(ENTRY))
        if isinstance(running.database, SyncDatabase):
            with running.database.begin() as session:
                session.add(Entry(note="audit"))
        else:
            async with running.database.begin() as session:
                session.add(Entry(note="audit"))

    exchange = await serve(running, work)
    assert (exchange.status, exchange.error) == (200, None)
    assert running.stored() == ["audit"]


async def test_begin_may_only_read_if_told_so(running: Running) -> None:
    """`begin()` works without a request."""
    before = kept(running.real)
    with pytest.raises(ForbiddenWrite, match="note"):
        if isinstance(running.database, SyncDatabase):
            with running.database.begin(read_only=True) as session:
                first(session).note = "changed"
        else:
            async with running.database.begin(read_only=True) as session:
                (await session.run_sync(first)).note = "changed"
    assert running.stored() == before


@pytest.mark.parametrize("answer", [None, 1, "yes"])
async def test_a_rule_that_decides_nothing_stores_nothing(running: Running, answer: Any) -> None:
    """The application is not called."""
    called = []

    async def work() -> None:
        called.append(1)

    exchange = await serve(running, work, "POST", read_only=lambda _: answer)
    assert isinstance(exchange.error, ConfigurationError)
    assert (exchange.messages, called) == ([], [])


@asynccontextmanager
async def begun(running: Running, **options: Any) -> AsyncIterator[Any]:
    """Run a function in `database.begin()` with its session, for each kind of database."""
    database = running.database
    if isinstance(database, SyncDatabase):
        with database.begin(**options) as session:

            async def work_in_thread(work: Any) -> Any:
                return work(session)

            yield work_in_thread
    else:
        async with database.begin(**options) as opened:
            yield opened.run_sync


@pytest.mark.parametrize("status", [404, 500])
async def test_a_request_that_rolls_back_is_answered(running: Running, status: int) -> None:
    """The request stores nothing, so nothing is lost."""
    before = kept(running.real)

    async def work() -> None:
        await on_session(running, change)

    exchange = await serve(running, work, status=status)
    assert (exchange.status, exchange.error) == (status, None)
    assert running.stored() == before


@pytest.mark.parametrize("name", OF_EACH_KIND)
async def test_an_error_response_is_complete(running: Running, name: str) -> None:
    """A handler that answers the refused write with 500 has rolled back, so its body is sent."""
    before = kept(running.real)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises((ForbiddenWrite, DBAPIError)):
            await on_session(running, WRITES[name])
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"sor", "more_body": True})
        await send({"type": "http.response.body", "body": b"ry"})
        if scope["path"] == "/again":
            await on_session(running, add)

    middleware = DBSessionMiddleware(app, running.database, read_only=safe_methods)
    exchange = await get(middleware)
    assert (exchange.status, exchange.body, exchange.error) == (500, b"sorry", None)
    exchange = await get(middleware, "/again")
    assert (exchange.body, type(exchange.error)) == (b"sorry", ForbiddenWrite)
    assert running.stored() == before


async def test_objects_that_are_not_changed_may_be_flushed(running: Running) -> None:
    """Setting the same value is no write, and an expunged object may change."""
    before = kept(running.real)

    def work(session: Session) -> None:
        entry = first(session)
        entry.note = str(entry.note)
        session.flush()
        session.expunge(entry)
        entry.note = "shown"

    async def handle() -> None:
        await on_session(running, work)

    exchange = await serve(running, handle)
    assert (exchange.status, exchange.error) == (200, None)
    assert running.stored() == before


async def test_a_savepoint_does_not_lift_it(running: Running) -> None:
    """If the application catches the error, the request fails anyway."""

    def work(session: Session) -> None:
        with pytest.raises((ForbiddenWrite, DBAPIError)), session.begin_nested():
            session.execute(text("INSERT INTO entry (note) VALUES ('new')"))
        session.execute(select(ENTRY))

    async def handle() -> None:
        await on_session(running, work)

    exchange = await serve(running, handle)
    assert (exchange.messages, type(exchange.error)) == ([], ForbiddenWrite)
    assert running.stored() == []


async def test_the_stream_and_what_follows_may_only_read_too(running: Running) -> None:
    """A streaming body uses the same session; its error reaches the server."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await on_session(running, add)
        await send({"type": "http.response.body", "body": b"b"})

    exchange = await get(DBSessionMiddleware(app, running.database, read_only=safe_methods))
    assert (exchange.body, type(exchange.error)) == (b"a", ForbiddenWrite)
    assert running.stored() == []


async def test_background_work_may_only_read_too(running: Running) -> None:
    """The error comes after the body, and reaches the server."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        await on_session(running, add)

    exchange = await get(DBSessionMiddleware(app, running.database, read_only=safe_methods))
    assert (exchange.status, type(exchange.error)) == (200, ForbiddenWrite)
    assert running.stored() == []


async def test_functions_of_on_commit_may_only_read_too(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """A write of an `on_commit` function is logged, like any of its errors."""
    called = []

    async def follow() -> None:
        called.append(1)
        await on_session(running, add)

    async def work() -> None:
        await running.execute(select(ENTRY))
        on_commit(follow)

    exchange = await serve(running, work)
    assert (exchange.status, exchange.error, called) == (200, None, [1])
    assert "may only read" in caplog.text
    assert running.stored() == []


@pytest.mark.parametrize("inner", [False, True])
async def test_whoever_joins_a_unit_that_may_only_read_may_only_read(
    running: Running, *, inner: bool
) -> None:
    """`begin(join=True)` belongs to the unit."""
    kept(running.real)

    async def work() -> None:
        async with begun(running, join=True, read_only=inner) as do:
            await do(change)

    if isinstance(running.database, SyncDatabase):
        with pytest.raises(ForbiddenWrite), running.database.begin(read_only=True):
            await work()
    else:
        exchange = await serve(running, work)
        assert (exchange.messages, type(exchange.error)) == ([], ForbiddenWrite)
    assert running.stored() == ["kept"]


@pytest.mark.parametrize("name", OF_EACH_KIND)
async def test_a_block_that_may_only_read_in_a_unit_that_may_write(
    running: Running, name: str
) -> None:
    """The block stores nothing, raises, and does not affect the outer work."""
    if name.startswith(("text", "the conn")) and not running.real.is_postgresql:
        pytest.skip("only PostgreSQL has savepoints that are read-only")
    kept(running.real)
    async with begun(running) as do:
        await do(execute(ENTRY.insert().values(note="before")))
        await do(execute(ENTRY.delete().where(ENTRY.c.note == "before")))
        with pytest.raises((ForbiddenWrite, DBAPIError)):
            async with begun(running, join=True, read_only=True) as do_inside:
                await do_inside(WRITES[name])
        await do(execute(ENTRY.insert().values(note="after")))
    assert running.stored() == ["kept", "after"]


async def test_a_block_that_catches_its_error_raises_it_at_its_end(running: Running) -> None:
    """The outer unit may be committed afterwards."""

    def write(session: Session) -> None:
        with pytest.raises(ForbiddenWrite):
            session.execute(INSERT)

    async with begun(running) as do:
        await do(execute(ENTRY.insert().values(note="before")))
        with pytest.raises(ForbiddenWrite):
            async with begun(running, join=True, read_only=True) as do_inside:
                await do_inside(write)
    assert running.stored() == ["before"]


@pytest.mark.parametrize("ended", ["commit", "rollback"])
@pytest.mark.parametrize("write", [WRITES["text"], add], ids=["text", "a new object"])
async def test_a_block_that_ends_the_transaction_may_still_only_read(
    running: Running, ended: str, write: Callable[[Session], Any]
) -> None:
    """Its next transaction is read-only; the outer unit may write after the block."""
    raised = False
    async with begun(running) as do:
        await do(execute(text("SELECT 1")))
        try:
            async with begun(running, join=True, read_only=True) as do_inside:
                await do_inside(lambda session: getattr(session, ended)())
                await do_inside(write)
        except (ForbiddenWrite, DBAPIError):
            raised = True
        await do(execute(text("INSERT INTO entry (note) VALUES ('after')")))
    assert (raised, running.stored()) == (True, ["after"])


async def test_a_block_that_a_task_left_open_forbids_nothing_outside(running: Running) -> None:
    """A block around it has failed, and has ended it too."""
    if isinstance(running.database, SyncDatabase):
        pytest.skip("a thread cannot be cancelled")
    database, is_open = running.database, asyncio.Event()

    async def stay() -> None:
        async with database.begin(join=True, read_only=True) as session:
            await session.execute(select(ENTRY))
            is_open.set()
            await asyncio.Event().wait()

    async with database.begin() as session:
        with pytest.raises(ZeroDivisionError):
            async with database.begin(join=True):
                staying = asyncio.create_task(stay())
                await is_open.wait()
                raise ZeroDivisionError
        await session.execute(ENTRY.insert().values(note="before"))
        staying.cancel()
        await asyncio.wait([staying])
        await session.execute(ENTRY.insert().values(note="after"))
    assert running.stored() == ["before", "after"]


@pytest.mark.parametrize("allows", ["outer", "inner", "neither"])
async def test_nested_middlewares_each_decide_for_their_own(running: Running, allows: str) -> None:
    """The outermost middleware manages the database, so it must have the rule too."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await on_session(running, add)
        await respond(send)

    def rule(allowed: bool) -> Any:
        return None if allowed else safe_methods

    inner = DBSessionMiddleware(app, running.database, read_only=rule(allows == "inner"))
    outer = DBSessionMiddleware(inner, running.database, read_only=rule(allows == "outer"))
    exchange = await get(outer)
    expected = ConfigurationError if allows == "outer" else ForbiddenWrite
    assert (exchange.messages, type(exchange.error)) == ([], expected)
    assert running.stored() == []
    posted = await get(outer, method="POST")
    assert (posted.status, running.stored()) == (200, ["new"])


async def test_a_web_socket_has_no_method_that_is_safe(running: Running) -> None:
    """A rule of the application may decide otherwise."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await on_session(running, add)
        await send({"type": "websocket.send", "text": "stored"})
        await send({"type": "websocket.close"})

    refused = Socket(DBSessionMiddleware(app, running.database, read_only=lambda _: True))
    await refused.run()
    assert (refused.heard, type(refused.error)) == ([], ForbiddenWrite)
    socket = Socket(DBSessionMiddleware(app, running.database, read_only=safe_methods))
    await socket.run()
    assert (socket.heard, running.stored()) == (["stored"], ["new"])


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE", "POST", "QUERY", "get"])
def test_safe_methods_are_those_of_the_standard(method: str) -> None:
    """RFC 9110, section 9.2.1; names of methods are case-sensitive."""
    is_safe = method in ("GET", "HEAD", "OPTIONS", "TRACE")
    assert safe_methods({"type": "http", "method": method}) is is_safe


async def test_no_answer_is_made_of_it(running: Running) -> None:
    """A write is a mistake of the application: it is not hidden, and a retry does not help."""
    called = []

    async def work() -> None:
        called.append(1)
        await on_session(running, add)

    exchange = await serve(
        running, work, attempts=3, on_commit_error=lambda _: pytest.fail("was asked")
    )
    assert (exchange.messages, type(exchange.error), called) == ([], ForbiddenWrite, [1])


async def test_the_report_says_so(running: Running) -> None:
    """The report of each unit of work shows if the unit may only read."""
    reports: list[UnitReport] = []

    async def work() -> None:
        await running.execute(select(ENTRY))
        async with begun(running) as do:
            await do(add)

    await serve(running, work, on_report=reports.append)
    await serve(running, work_of(running), "POST", on_report=reports.append)
    assert [each.read_only for each in reports] == [False, True, False]


def work_of(running: Running) -> Any:
    """Read."""

    async def work() -> None:
        await running.execute(select(ENTRY))

    return work


@pytest.mark.parametrize("name", OF_EACH_KIND)
async def test_rolled_back_refuses_too(real: Real, name: str) -> None:
    """All sessions share one connection there; a `begin()` inside may write."""
    if real.is_mariadb and name.startswith(("text", "the conn")):
        pytest.skip("MariaDB has no savepoints that are read-only")
    kept(real)
    database = real.describe()
    running = Running(real, database)
    async with rolled_back(database):

        async def audit() -> None:
            await running.execute(select(ENTRY))
            await running.execute(text("SELECT 1"))
            async with begun(running) as do:
                await do(execute(text("INSERT INTO entry (note) VALUES ('audit')")))
            await running.execute(text("SELECT 1"))
            await on_session(running, WRITES[name])

        exchange = await serve(running, audit)
        assert exchange.messages == []
        assert isinstance(exchange.error, (ForbiddenWrite, DBAPIError))
        async with begun(running) as do:
            notes = await do(lambda session: list(session.scalars(select(ENTRY.c.note))))
            await do(execute(text("INSERT INTO entry (note) VALUES ('test')")))
        assert sorted(notes) == ["audit", "kept"]
    assert real.stored() == ["kept"]


@pytest.mark.parametrize("kinds", ["asyncpg + psycopg", "sqlite + asyncpg"])
async def test_several_databases_may_only_be_read(kinds: str, tmp_path: Path) -> None:
    """A write to one database fails the request, and no database stores anything."""
    async with several_databases(kinds, tmp_path) as several:
        two_phase = "sqlite" not in kinds

        async def app(scope: Any, receive: Any, send: Any) -> None:
            for each in several.each:
                await each.execute(select(func.count(), func.lower("A")))
            if scope["path"] == "/write":
                several.databases[1].get_session().add(SeveralEntry("new"))
            await respond(send)

        middleware = DBSessionMiddleware(
            app, *several.databases, read_only=safe_methods, two_phase=two_phase
        )
        assert (await get(middleware)).status == 200
        exchange = await get(middleware, "/write")
        assert (exchange.messages, type(exchange.error)) == ([], ForbiddenWrite)
        assert several.stored() == [[], []]


async def test_cancelled_anywhere_it_leaves_a_connection_that_may_write(real: Real) -> None:
    """What tells the database is taken back, however far it came."""
    async with real.describe(pool_size=1, max_overflow=0) as database:
        running = Running(real, database)

        async def read() -> None:
            await running.execute(text("SELECT 1"))

        async def write() -> None:
            await running.execute(INSERT)
            await running.execute(ENTRY.delete())

        for turns in range(0, 40, 2):
            task = asyncio.create_task(serve(running, read))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            posted = await serve(running, write, "POST")
            assert (posted.status, posted.error) == (200, None)
        await real.assert_clean(database)


async def test_a_connection_that_dies_is_replaced(real: Real) -> None:
    """As in a unit that may write."""
    if real.is_sqlite:
        pytest.skip("SQLite has no server")
    async with real.describe() as database:
        running = Running(real, database)

        async def read_and_die() -> None:
            await running.execute(text("SELECT 1"))
            real.kill()
            await running.execute(text("SELECT 1"))

        exchange = await serve(running, read_and_die)
        assert (exchange.messages, isinstance(exchange.error, DBAPIError)) == ([], True)
        assert (await serve(running, work_of(running))).status == 200
        await real.assert_clean(database)


async def test_what_makes_it_read_only_is_not_counted(real: Real) -> None:
    """As BEGIN is not."""
    async with real.describe() as database:
        running = Running(real, database)
        reports: list[UnitReport] = []
        with count_statements(database) as statements:
            await serve(running, work_of(running), on_report=reports.append)
        assert len(statements) == 1
        assert [each.databases[0].statements for each in reports] == [1]


async def test_what_is_refused_in_another_unit_is_not_blamed_on_it(real: Real) -> None:
    """On the same connection, whose own transaction the application has made read-only."""
    if not real.is_postgresql:
        pytest.skip("one database says it all")
    async with real.describe(pool_size=1, max_overflow=0) as database:
        running = Running(real, database)

        async def write() -> None:
            await running.execute(text("SET TRANSACTION READ ONLY"))
            await running.execute(text("INSERT INTO entry (note) VALUES ('new')"))

        await serve(running, work_of(running))
        exchange = await serve(running, write, "POST")
    assert "read-only transaction" in str(exchange.error)
    assert not getattr(exchange.error, "__notes__", ())


async def read_until_cancelled(database: Any, way: str, turns: int) -> None:
    """Read and commit in a unit of work that may only read, and cancel it after some turns."""
    scopes: list[CancelScope] = []

    async def read() -> None:
        with CancelScope() as scope:
            scopes.append(scope)
            async with database.begin(read_only=True) as session:
                await session.execute(select(ENTRY))
                await session.commit()
                await session.execute(select(ENTRY))
        await asyncio.sleep(0)

    task = asyncio.create_task(read())
    for _ in range(turns):
        await asyncio.sleep(0)
    if way == "anyio" and scopes:
        scopes[0].cancel()
    else:
        task.cancel()
    await asyncio.wait([task])
    assert task.cancelled() or task.exception() is None


@pytest.mark.parametrize("way", ["native", "anyio"])
async def test_a_reader_that_is_cancelled_gives_its_connection_back_to_writers(
    real: Real, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also at a COMMIT of the application, which a cancellation interrupts."""
    if real.is_sync or real.is_mariadb:
        pytest.skip("nothing is told to the connection when it returns to its pool")
    stored = []

    def use_wal(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA journal_mode = WAL")

    options: dict[str, Any] = {"pool_events": [(use_wal, "connect")]} if real.is_sqlite else {}
    async with real.describe(pool_size=1, max_overflow=0, pool_timeout=1, **options) as database:
        running = Running(real, database)
        for turns in range(100):
            await read_until_cancelled(database, way, turns)
            assert checked_out(database) == 0
            async with running.database.begin():  # type: ignore[union-attr]
                await running.write(f"{turns}")
            stored.append(f"{turns}")
    assert real.stored() == stored
    caplog.clear()  # the pool of SQLAlchemy logs that its ROLLBACK was cancelled


async def decide_later(_: Any) -> bool:
    """What no rule may be."""
    return True


@pytest.mark.parametrize("rule", [True, "GET", decide_later])
def test_a_rule_that_is_no_plain_function_is_refused(rule: Any) -> None:
    """When the middleware is made."""
    app: Any = decide_later
    with pytest.raises(ConfigurationError, match="read_only takes a plain function"):
        DBSessionMiddleware(app, "sqlite:///shop.db", read_only=rule)
