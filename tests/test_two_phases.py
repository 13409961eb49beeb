"""Tests `two_phase=True`: after all databases are prepared, a COMMIT can fail only for a while."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Life, get, respond
from conftest import ENTRY, Real, becomes_true, checked_out
from pages import ROOT, Page
from several import Several, engine_of, in_session, orm, several_databases, swallow_an_error
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import Session

from asgi_dbsession import ConfigurationError, DBSessionMiddleware, TransactionAborted, on_commit
from asgi_dbsession.session.two_phases import log_decision

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/several-databases.md")
PAIRS = ("asyncpg + asyncmy", "aiomysql + psycopg", "psycopg-sync + pymysql-sync")
LOGGER = "asgi_dbsession"


@pytest.fixture(params=PAIRS)
async def several(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Several]:
    """PostgreSQL and MariaDB with each driver; no transaction is in doubt afterwards."""
    async with several_databases(request.param, tmp_path) as databases:
        yield databases
        assert [in_doubt(real) for real in databases.reals] == [[], []]


def in_doubt(real: Real) -> list[str]:
    """Return the prepared transactions that are not committed yet."""
    with real.reader.connect() as connection:
        if real.is_postgresql:
            return list(connection.scalars(text("SELECT gid FROM pg_prepared_xacts")))
        return [row.data.decode() for row in connection.execute(text("XA RECOVER"))]


def resolve(real: Real, log: str) -> None:
    """Commit the transactions in doubt, as the page says."""
    names: dict[str, Any] = {"__name__": "resolve"}
    exec(compile(PAGE.files()["resolve.py"], "resolve.py", "exec"), names)
    driver = "postgresql+psycopg" if real.is_postgresql else "mysql+pymysql"
    names["resolve"](real.url.set(drivername=driver), log)


async def test_all_are_prepared_before_the_first_is_committed(
    several: Several, caplog: pytest.LogCaptureFixture
) -> None:
    """The log shows the prepared transactions before the first COMMIT."""
    done: list[Any] = []
    for number, running in enumerate(several.each):
        for name in ("prepare_twophase", "commit_twophase"):

            def note(*_: Any, name: str = name, number: int = number) -> None:
                done.append((name, number, "and to be committed" in caplog.text))

            event.listen(engine_of(running), name, note)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("written")
        await several.add("added")
        on_commit(lambda: done.append(several.stored()))
        await respond(send)

    with caplog.at_level(logging.INFO, LOGGER):
        middleware = DBSessionMiddleware(app, *several.databases, two_phase=True)
        exchange = await get(middleware)
    assert (exchange.status, exchange.error) == (200, None)
    assert done == [
        ("prepare_twophase", 0, False),
        ("prepare_twophase", 1, False),
        ("commit_twophase", 0, True),
        ("commit_twophase", 1, True),
        [["written", "added"]] * 2,
    ]


async def test_what_cannot_be_prepared_is_stored_nowhere(several: Several) -> None:
    """A deferred constraint is refused at PREPARE, before anything is committed."""
    (refusing,) = (each for each in several.each if each.real.is_postgresql)
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("lost")
        await refusing.doom()
        on_commit(lambda: done.append("called"))
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
    assert isinstance(exchange.error, IntegrityError)
    assert (exchange.messages, done, several.stored()) == ([], [], [[], []])


async def test_an_error_that_a_listener_swallows_is_seen_before_anything_is_decided(
    several: Several,
) -> None:
    """PostgreSQL answers PREPARE TRANSACTION with a ROLLBACK then, as it does for COMMIT."""
    (aborted,) = (each for each in several.each if each.real.is_postgresql)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.add("lost")
        event.listen(orm(aborted), "after_flush", swallow_an_error, once=True)
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
    assert isinstance(exchange.error, TransactionAborted)
    assert (exchange.messages, several.stored()) == ([], [[], []])


@pytest.mark.parametrize("how", ["status", "error", "swallowed", "savepoint"])
async def test_what_is_not_prepared_ends_as_in_one_phase(several: Several, how: str) -> None:
    """All work, or a savepoint, is rolled back, and the next request can use the connections."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("first")
        if how == "savepoint":
            for running in several.each:
                await in_session(running, lambda session: session.begin_nested())
            await several.write("inside")
        elif how in ("error", "swallowed"):
            for running in several.each:
                with pytest.raises(IntegrityError):
                    await running.write("first")
        if how == "error":
            raise LookupError
        await respond(send, 400 if how == "status" else 200)

    middleware = DBSessionMiddleware(app, *several.databases, two_phase=True)
    for _ in range(2):
        await get(middleware)
        await several.assert_clean()
        expected = [["first", "inside"]] * 2 if how == "savepoint" else [[], []]
        assert several.stored() == expected


async def test_a_session_that_is_alone_commits_in_one_phase(several: Several) -> None:
    """A single database needs no second phase, and leaves no transaction in doubt."""
    for running in several.each:
        engine = engine_of(running)
        if running.real.is_postgresql:  # SQLAlchemy has no other method for XA
            event.listen(engine, "prepare_twophase", lambda *_: pytest.fail("it was prepared"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.each[int(scope["path"][1:])].write("kept")
        await respond(send)

    middleware = DBSessionMiddleware(app, *several.databases, two_phase=True)
    for number in range(2):
        assert (await get(middleware, f"/{number}")).error is None
    assert several.stored() == [["kept"], ["kept"]]


async def test_after_a_commit_alone_the_rest_of_the_request_is_in_two_phases(
    several: Several,
) -> None:
    """A background task that uses both databases is prepared on both."""
    prepared: list[int] = []
    for number, running in enumerate(several.each):
        event.listen(
            engine_of(running), "prepare_twophase", lambda *_, n=number: prepared.append(n)
        )
    (alone,) = (each for each in several.each if each.real.is_postgresql)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await alone.write("alone")
        await respond(send)
        assert prepared == []
        await several.write("together")

    exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
    assert (exchange.status, exchange.error) == (200, None)
    assert prepared == [0, 1]


async def test_functions_after_commit_commit_in_two_phases_too(several: Several) -> None:
    """What an `on_commit` function writes to several databases is prepared on each of them."""
    prepared: list[int] = []
    for number, running in enumerate(several.each):
        event.listen(
            engine_of(running), "prepare_twophase", lambda *_, n=number: prepared.append(n)
        )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        on_commit(lambda: several.write("followed"))
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
    assert (exchange.status, prepared) == (200, [0, 1])
    assert several.stored() == [["followed"], ["followed"]]


async def test_the_first_of_two_prepared_commits_that_fail_is_the_one_reported(
    several: Several, caplog: pytest.LogCaptureFixture
) -> None:
    """The server gets the error of the first declared database; the log has both errors."""
    for each in several.each:
        event.listen(
            engine_of(each), "commit_twophase", lambda *_, each=each: each.real.kill(), once=True
        )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("kept")
        await respond(send)

    with caplog.at_level(logging.INFO, LOGGER):
        exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
    for real in several.reals:
        resolve(real, caplog.text)
    assert isinstance(exchange.error, DBAPIError)
    assert isinstance(exchange.error.orig, engine_of(several.each[0]).dialect.loaded_dbapi.Error)
    assert sum(each.levelno == logging.ERROR for each in caplog.records) == 2


@pytest.mark.parametrize("number", [0, 1])
async def test_one_that_is_lost_when_all_are_prepared_is_stored_in_the_end(
    several: Several, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The others are committed, the log names the transaction in doubt, the page resolves it."""
    runs: list[Any] = []
    lost = several.each[number]
    event.listen(
        engine_of(lost), "commit_twophase", lambda *_: lost.real.kill(), once=True
    )  # between PREPARE and COMMIT

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(scope)
        await several.write("kept")
        on_commit(lambda: runs.append("called"))
        await respond(send)

    with caplog.at_level(logging.INFO, LOGGER):
        middleware = DBSessionMiddleware(app, *several.databases, two_phase=True, attempts=3)
        exchange = await get(middleware)
    assert isinstance(exchange.error, DBAPIError)
    assert (exchange.messages, len(runs)) == ([], 1)
    assert [checked_out(each) for each in several.databases] == [0, 0]
    assert several.stored() == [[] if each is lost else ["kept"] for each in several.each]
    (xid,) = in_doubt(lost.real)
    (error,) = (each for each in caplog.records if each.levelno == logging.ERROR)
    assert xid in error.getMessage()
    resolve(lost.real, caplog.text)
    assert several.stored() == [["kept"], ["kept"]]


# This looks like a serialization failure, for any cause.
RACE = "DO $$ BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '40001'; END $$"


async def test_what_is_decided_does_not_run_again(
    several: Several, caplog: pytest.LogCaptureFixture
) -> None:
    """No database has committed, and a conflict happened before."""
    runs: list[Any] = []
    for each in several.each:
        event.listen(
            engine_of(each), "commit_twophase", lambda *_, each=each: each.real.kill(), once=True
        )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(scope)
        await several.write("kept")
        for each in several.each:
            if each.real.is_postgresql:
                await in_session(each, lose)
        await respond(send)

    def lose(session: Session) -> None:
        with pytest.raises(DBAPIError, match="lost"), session.begin_nested():
            session.execute(text(RACE))

    with caplog.at_level(logging.INFO, LOGGER):
        middleware = DBSessionMiddleware(app, *several.databases, two_phase=True, attempts=3)
        await get(middleware)
    assert (len(runs), several.stored()) == (1, [[], []])
    for real in several.reals:
        resolve(real, caplog.text)
    assert several.stored() == [["kept"], ["kept"]]


PROGRAM = """
import asyncio, logging, os, signal, sys

from sqlalchemy import event, text

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware

logging.basicConfig(filename=sys.argv[1], level=logging.INFO)
databases = [AsyncDatabase(url) for url in sys.argv[2:4]]

async def app(scope, receive, send):
    for database in databases:
        await database.get_session().execute(text("INSERT INTO entry (note) VALUES ('kept')"))
    await send({"type": "http.response.start", "status": 200, "headers": []})

async def main():
    for database in databases:
        await database.startup()
    engine = databases[int(sys.argv[5])].engine.sync_engine
    event.listen(engine, sys.argv[4], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    scope = {"type": "http", "method": "GET", "path": "/"}
    await DBSessionMiddleware(app, *databases, two_phase=True)(scope, None, None)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("name", "number", "doubtful", "stored"),
    [
        ("prepare_twophase", 1, [1, 0], []),
        ("commit_twophase", 0, [1, 1], ["kept"]),
        ("commit_twophase", 1, [0, 1], ["kept"]),
    ],
)
async def test_a_process_that_is_killed_leaves_what_the_log_decides(
    tmp_path: Path, name: str, number: int, doubtful: list[int], stored: list[str]
) -> None:
    """A crash before, during and after the commits stores all work or nothing."""
    log = tmp_path / "server.log"
    async with several_databases("asyncpg + asyncmy", tmp_path) as several:
        urls = [real.url.render_as_string(hide_password=False) for real in several.reals]
        command = [sys.executable, "-c", PROGRAM, str(log), *urls, name, str(number)]
        process = await asyncio.create_subprocess_exec(
            *command, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        assert await process.wait() == -signal.SIGKILL
        await becomes_true(lambda: sum(real.connections() for real in several.reals) == 2)
        assert [len(in_doubt(real)) for real in several.reals] == doubtful
        for real in several.reals:
            resolve(real, log.read_text())
            assert in_doubt(real) == []
        assert several.stored() == [stored, stored]


@pytest.mark.parametrize("swallowed", [True, False])
async def test_a_deadlock_inside_of_xa_is_rolled_back(tmp_path: Path, *, swallowed: bool) -> None:
    """MariaDB refuses XA END then: its connection is closed, and other requests still work."""
    async with several_databases("asyncmy + asyncpg", tmp_path) as several:
        maria = several.each[0]

        def update(number: int) -> Any:
            return ENTRY.update().where(ENTRY.c.id == number).values(note=f"changed {number}")

        with maria.real.reader.connect() as autocommitting:
            connection = autocommitting.execution_options(isolation_level="READ COMMITTED")
            connection.execute(ENTRY.insert(), [{"id": 1, "note": "a"}, {"id": 2, "note": "b"}])
            connection.commit()
            # The database rolls back the transaction that has written less.
            connection.execute(ENTRY.insert(), [{"note": f"row {n}"} for n in range(50)])
            connection.execute(update(2))
            blocked: list[Any] = []

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await several.each[1].write("lost")
                await maria.execute(update(1))
                blocked.append(
                    asyncio.create_task(asyncio.to_thread(connection.execute, update(1)))
                )
                await becomes_true(lambda: is_waiting(maria.real))
                if swallowed:
                    with pytest.raises(OperationalError, match="1213"):
                        await maria.execute(update(2))
                else:
                    await maria.execute(update(2))
                await respond(send)

            middleware = DBSessionMiddleware(app, *several.databases, two_phase=True)
            exchange = await get(middleware)
            await blocked[0]
            connection.rollback()
        assert isinstance(exchange.error, TransactionAborted if swallowed else OperationalError)
        assert several.stored() == [["a", "b"], []]


def is_waiting(real: Real) -> bool:
    """Return True if a session waits for a lock; `innodb_trx` shows old data if asked often."""
    with real.reader.connect() as connection:
        return "LOCK WAIT" in connection.execute(text("SHOW ENGINE INNODB STATUS")).one().Status


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application."""


@pytest.mark.parametrize("kind", ["sqlite", "sqlite-sync"])
async def test_sqlite_is_refused(tmp_path: Path, kind: str) -> None:
    """The error comes at the startup, not at the first request."""
    async with several_databases(f"asyncpg + {kind}", tmp_path) as several:
        app = DBSessionMiddleware(nothing, *several.databases, two_phase=True)
        life = await Life(app).startup()
        await asyncio.wait([life.task])
        (message,) = life.messages
        assert message["type"] == "lifespan.startup.failed"
        assert "Leave out `two_phase=True`" in message["message"]
        assert isinstance(life.error, ConfigurationError)


def test_the_log_line_on_the_page_is_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A reader who searches for it finds the page, and so does `resolve.py`."""
    (line,) = PAGE.blocks("text")
    transactions = line.removeprefix("Prepared, and to be committed: ").strip().split(", ")
    with caplog.at_level(logging.INFO, LOGGER):
        log_decision(transactions)
    assert caplog.messages == [line.strip()]
