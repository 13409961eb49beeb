"""Several real databases, used in one request."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from anyio import to_thread
from conftest import ENTRY, AnyDatabase, Real, Running, checked_out, real_database
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, registry

from asgi_dbsession import SyncDatabase


class Entry:
    """A row that is written by a flush."""

    note: str

    def __init__(self, note: str) -> None:
        self.note = note


registry().map_imperatively(Entry, ENTRY)


class Several:
    """Several databases in declared order.

    Args:
        reals: What they are.
        databases: The same, running.
    """

    def __init__(self, reals: list[Real], databases: list[AnyDatabase]) -> None:
        self.reals = reals
        self.databases = databases
        self.each = [Running(*pair) for pair in zip(reals, databases, strict=True)]

    async def write(self, note: str) -> None:
        """Store a row in each of them."""
        for running in self.each:
            await running.write(note)

    async def add(self, note: str) -> None:
        """Have a flush store a row in each of them."""
        for running in self.each:
            await in_session(running, lambda session: session.add(Entry(note)))

    def stored(self) -> list[list[str]]:
        """Return the notes of all stored rows of each database."""
        return [real.stored() for real in self.reals]

    async def assert_free(self) -> None:
        """Nothing checked out of a pool, whatever is left in doubt on a server."""
        assert [checked_out(each) for each in self.databases] == [0] * len(self.databases)

    async def assert_clean(self) -> None:
        """Check that no connection is checked out and no transaction is open on any server."""
        for running in self.each:
            await running.assert_clean()


async def in_session(running: Running, work: Any) -> None:
    """Call a function with the plain session of the request, in a thread if the session blocks."""
    database = running.database
    if isinstance(database, SyncDatabase):
        await to_thread.run_sync(lambda: work(database.get_session()))
    else:
        await database.get_session().run_sync(work)


def orm(running: Running) -> Session:
    """Return the plain session of the request."""
    opened: Any = running.database.get_session()
    session: Session = getattr(opened, "sync_session", opened)
    return session


def swallow_an_error(session: Session, *_: Any) -> None:
    """Do what a careless flush listener does."""
    with suppress(DBAPIError):
        session.execute(text("SELECT * FROM no_such_table"))


def engine_of(running: Running) -> Engine:
    """Return the plain engine, for events."""
    engine: Any = running.database.engine
    sync_engine: Engine = getattr(engine, "sync_engine", engine)
    return sync_engine


@asynccontextmanager
async def several_databases(kinds: str, folder: Path) -> AsyncIterator[Several]:
    """Empty running databases of these kinds, checked after the test."""
    reals: list[Real] = []
    for kind in kinds.split(" + "):
        has_postgresql = any(real.is_postgresql for real in reals)
        reals.append(real_database(kind, folder, "more" if has_postgresql else "tests"))
    try:
        async with AsyncExitStack() as stack:
            databases = [real.describe() for real in reals]
            for database in databases:
                await stack.enter_async_context(database)
            several = Several(reals, databases)
            yield several
            await several.assert_clean()
    finally:
        for real in reals:
            real.reader.dispose()
