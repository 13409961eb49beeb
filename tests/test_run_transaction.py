"""Tests `run_transaction`, which retries for workers and scripts."""

import asyncio
import logging
from typing import Any

import pytest
from anyio import to_thread
from asgi import get, respond
from conftest import ENTRY, WITH_MARIADB, Running
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from asgi_dbsession import (
    AsyncDatabase,
    Attempt,
    ConfigurationError,
    DBSessionMiddleware,
    SyncDatabase,
    current_attempt,
    on_commit,
)

pytestmark = pytest.mark.anyio

KINDS = WITH_MARIADB
SERVERS = pytest.mark.parametrize(
    "real", ["asyncpg", "psycopg-sync", "asyncmy", "pymysql-sync"], indirect=True
)
POSTGRESQL = pytest.mark.parametrize("real", ["asyncpg", "psycopg-sync"], indirect=True)


class Conflict(Exception):
    """The exception of an application."""


async def run(running: Running, work: Any, *args: Any, **options: Any) -> Any:
    """Run a function with a session in a transaction, for each kind of database."""
    database = running.database
    if isinstance(database, AsyncDatabase):

        async def in_task(*args: Any) -> Any:
            return await database.get_session().run_sync(work, *args)

        return await database.run_transaction(in_task, *args, **options)

    def in_thread(*args: Any) -> Any:
        return work(database.get_session(), *args)

    return await to_thread.run_sync(lambda: database.run_transaction(in_thread, *args, **options))


class Work:
    """Writes a row, and fails in its first attempts.

    Args:
        error: What it raises; None for a serialization failure that the database reports.
        failures: How often.
        commits: Whether it commits by itself first.
    """

    def __init__(
        self, error: Exception | None = None, *, failures: int = 1, commits: bool = False
    ) -> None:
        self.error = error
        self.failures = failures
        self.commits = commits
        self.attempts: list[Attempt] = []

    def __call__(self, session: Session, note: str = "kept") -> str:
        self.attempts.append(current_attempt())
        session.execute(ENTRY.insert().values(note=note))
        if self.commits:
            session.commit()
        if len(self.attempts) <= self.failures:
            if self.error is not None:
                raise self.error
            refuse(session)
        return note


def refuse(session: Session) -> None:
    """Let the server report that another transaction has won."""
    if session.get_bind().dialect.name == "postgresql":
        raising = "DO $$ BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '40001'; END $$"
    else:
        raising = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'lost'"
    session.execute(text(raising))


async def test_it_commits_and_returns_what_the_function_returns(running: Running) -> None:
    """Without a conflict, the function runs once, with the given arguments."""
    work = Work(failures=0)
    assert await run(running, work, "given") == "given"
    assert running.stored() == ["given"]
    assert work.attempts == [Attempt(1, 2)]


@SERVERS
async def test_a_conflict_is_run_again_as_if_it_had_never_been(running: Running) -> None:
    """Work of failed attempts is rolled back; each attempt has its own session."""
    work = Work(failures=2)
    assert await run(running, work) == "kept"
    assert running.stored() == ["kept"]
    assert work.attempts == [Attempt(1, 2), Attempt(2, 1), Attempt(3, 0)]


async def test_what_the_application_counts_is_run_again(running: Running) -> None:
    """`retry_on` names one error; any other error is raised at once."""
    assert await run(running, Work(Conflict()), retry_on=Conflict) == "kept"
    other = Work(KeyError())
    with pytest.raises(KeyError):
        await run(running, other, "lost", retry_on=Conflict)
    assert len(other.attempts) == 1
    assert running.stored() == ["kept"]


@SERVERS
async def test_the_error_of_the_last_attempt_rises_when_all_are_spent(running: Running) -> None:
    """The error is raised unchanged, and nothing is stored."""
    work = Work(failures=9)
    with pytest.raises(DBAPIError, match="lost"):
        await run(running, work, attempts=2)
    assert len(work.attempts) == 2
    assert running.stored() == []


@SERVERS
async def test_never_again_when_something_else_was_committed_inside(running: Running) -> None:
    """After a commit by the function itself, a retry would do this work twice."""
    work = Work(failures=9, commits=True)
    with pytest.raises(DBAPIError, match="lost"):
        await run(running, work)
    assert len(work.attempts) == 1
    assert running.stored() == ["kept"]


async def test_a_commit_on_another_database_inside_counts_too(
    running: Running, tmp_path: Any
) -> None:
    """A `begin()` inside the function has committed."""
    other = SyncDatabase(f"sqlite:///{tmp_path}/other.db")
    runs: list[int] = []

    def work(session: Session) -> None:
        runs.append(1)
        with other.begin() as own:
            own.execute(text("CREATE TABLE IF NOT EXISTS note (text TEXT)"))
        raise Conflict

    async with other:
        with pytest.raises(Conflict):
            await run(running, work, retry_on=Conflict)
    assert len(runs) == 1


@POSTGRESQL
async def test_a_conflict_that_only_commit_finds_is_run_again(running: Running) -> None:
    """Under SERIALIZABLE, two transactions each read rows that the other wrote."""

    def count(session: Session, name: str) -> None:
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        number = len(session.scalars(select(ENTRY.c.note)).all())
        session.execute(ENTRY.insert().values(note=f"{name} after {number}"))

    async with asyncio.TaskGroup() as group:
        for name in "abcdefgh":
            group.create_task(run(running, count, name, attempts=20))
    assert [note[-1] for note in running.stored()] == list("01234567")


async def test_functions_given_to_on_commit_are_those_of_the_last_attempt(
    running: Running,
) -> None:
    """Functions given in a failed attempt are dropped."""
    called: list[int] = []

    def work(session: Session) -> None:
        number = current_attempt().number
        on_commit(lambda: called.append(number))
        if number < 3:
            raise Conflict

    await run(running, work, retry_on=Conflict)
    assert called == [3]


async def test_50_workers_that_get_or_create_make_one_row(running: Running) -> None:
    """All transactions succeed."""

    def get_or_create(session: Session) -> int:
        query = select(ENTRY.c.id).where(ENTRY.c.note == "shared")
        if session.scalar(query) is None:
            session.execute(ENTRY.insert().values(note="shared"))
        return int(session.scalars(query).one())

    options: Any = {"attempts": 10, "retry_on": IntegrityError}
    ids = await asyncio.gather(*(run(running, get_or_create, **options) for _ in range(50)))
    assert len(set(ids)) == 1
    assert running.stored() == ["shared"]


@SERVERS
async def test_each_retry_is_one_line_in_the_log(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The log line has the name of the function."""
    with caplog.at_level(logging.INFO, "asgi_dbsession"):
        await run(running, Work())
    (line,) = [each.getMessage() for each in caplog.records if each.name == "asgi_dbsession"]
    assert line.startswith("Attempt 2 of 3 of 'run.<locals>.in_t")
    assert "lost" in line


@SERVERS
async def test_a_request_around_it_does_not_repeat_what_it_committed(running: Running) -> None:
    """The request meets its conflict after a COMMIT that stays."""
    runs: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(1)
        await run(running, Work())
        await running.call("execute", text("SELECT 1"))
        session: Any = running.database.get_session()
        if running.real.is_sync:
            await to_thread.run_sync(refuse, session)
        else:
            await session.run_sync(refuse)
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, running.database, attempts=3))
    assert isinstance(exchange.error, DBAPIError)
    assert (len(runs), running.stored()) == (1, ["kept"])


async def test_the_wrong_kind_of_function_is_refused(running: Running) -> None:
    """Nothing is stored, and the error says how to write the function."""
    database: Any = running.database

    async def coroutine_function() -> None: ...

    def plain_function() -> None: ...

    if running.real.is_sync:
        with pytest.raises(ConfigurationError, match="Write it with `def`"):
            await to_thread.run_sync(database.run_transaction, coroutine_function)
    else:
        with pytest.raises(ConfigurationError, match="Write it with `async def`"):
            await database.run_transaction(plain_function)
        with pytest.raises(ConfigurationError, match=r"write `run_transaction\(function, "):
            await database.run_transaction(coroutine_function())
    for attempts in (0, "3", True):
        with pytest.raises(ConfigurationError, match="a whole number, 1 or more"):
            await run(running, Work(), attempts=attempts)
    with pytest.raises(ConfigurationError, match="a class of exceptions"):
        await run(running, Work(), retry_on="Conflict")


@POSTGRESQL
async def test_a_cancelled_transaction_is_not_run_again(running: Running) -> None:
    """The function is cancelled, after any error of the database."""
    if running.real.is_sync:
        pytest.skip("a thread is not cancelled")
    database: Any = running.database
    runs: list[int] = []

    async def work() -> None:
        runs.append(1)
        try:
            await database.get_session().run_sync(refuse)
        except DBAPIError:
            await asyncio.sleep(10)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await database.run_transaction(work)
    assert len(runs) == 1
