"""A request that may only read stores nothing, and fails loudly if it tries to write."""

from collections.abc import Callable
from typing import Any

import pytest
from anyio import to_thread
from asgi import Exchange, get, respond
from conftest import ENTRY, METADATA, WITH_MARIADB, Real, Running
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session

from asgi_dbsession import (
    ConfigurationError,
    DBSessionMiddleware,
    ForbiddenWrite,
    SyncDatabase,
    safe_methods,
    set_rollback,
)

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


def add(session: Session) -> None:
    """Add an object."""
    session.add(Entry(note="new"))


def change(session: Session) -> None:
    """Change an object that was loaded."""
    session.scalars(select(Entry)).one().note = "changed"


def remove(session: Session) -> None:
    """Delete an object that was loaded."""
    session.delete(session.scalars(select(Entry)).one())


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
    session.scalars(select(Entry)).one()
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


async def on_session(running: Running, work: Callable[[Session], Any]) -> Any:
    """Do something with the session of the request, whatever its kind."""
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


@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize("name", WRITES)
async def test_a_write_is_refused_and_stores_nothing(
    running: Running, name: str, *, swallowed: bool
) -> None:
    """The server gets the error, also if the application has caught it."""
    before, raised = kept(running.real), []

    async def work() -> None:
        try:
            await on_session(running, WRITES[name])
        except (ForbiddenWrite, DBAPIError) as error:
            raised.append(error)
            if not swallowed:
                raise
            await running.call("rollback")

    exchange = await serve(running, work)
    assert exchange.messages == []
    assert raised
    if swallowed:
        assert isinstance(exchange.error, ForbiddenWrite)
    else:
        assert exchange.error is raised[0]
        assert "database.begin()" in " ".join(
            (str(exchange.error), *getattr(exchange.error, "__notes__", ()))
        )
    assert running.stored() == before


@pytest.mark.parametrize("name", UNFLUSHED)
@pytest.mark.parametrize("lifted", [False, True])
async def test_what_was_never_flushed_fails_the_request_too(
    running: Running, name: str, *, lifted: bool
) -> None:
    """Such as a GET that blanks a password on the object that it shows."""
    before = kept(running.real)

    async def work() -> None:
        await on_session(running, UNFLUSHED[name])
        if lifted:
            set_rollback(False)

    exchange = await serve(running, work)
    assert exchange.messages == []
    assert isinstance(exchange.error, ForbiddenWrite)
    assert "Entry" in str(exchange.error)
    assert running.stored() == before


async def test_the_next_request_on_the_connection_may_write(real: Real) -> None:
    """The database is told for one transaction."""
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


async def test_begin_inside_of_a_request_that_may_only_read_may_write(running: Running) -> None:
    """It is a unit of its own: for an audit row, say."""

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
    """Without a request."""
    before = kept(running.real)
    with pytest.raises(ForbiddenWrite, match="note"):
        if isinstance(running.database, SyncDatabase):
            with running.database.begin(read_only=True) as session:
                session.scalars(select(Entry)).one().note = "changed"
        else:
            async with running.database.begin(read_only=True) as session:
                (await session.scalars(select(Entry))).one().note = "changed"
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
