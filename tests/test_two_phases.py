"""Tests `two_phase=True`: after all databases are prepared, a COMMIT can fail only for a while."""

import asyncio
import json
import logging
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread
from asgi import Life, get, respond
from conftest import CHILD, ENTRY, Real, Running, becomes_true, checked_out, real_database
from pages import ROOT, Page
from several import Several, engine_of, in_session, orm, several_databases, swallow_an_error
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import Session, registry
from sqlalchemy.pool import NullPool

from asgi_dbsession import (
    ConfigurationError,
    DBSessionMiddleware,
    SyncDatabase,
    TransactionAborted,
    on_commit,
)
from asgi_dbsession.unit.optional.two_phases.session import is_refused

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/several-databases.md")
PAIRS = ("asyncpg + asyncmy", "aiomysql + psycopg", "psycopg-sync + pymysql-sync")


class Child:
    """A row that only COMMIT can refuse."""

    entry_id: int


registry().map_imperatively(Child, CHILD)


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
            query = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
            return list(connection.scalars(text(query)))
        return [row.data.decode() for row in connection.execute(text("XA RECOVER"))]


def script() -> dict[str, Any]:
    """The functions of the script on the page."""
    names: dict[str, Any] = {"__name__": "resolve"}
    exec(compile(PAGE.files()["resolve.py"], "resolve.py", "exec"), names)
    return names


def resolve(*reals: Real) -> None:
    """Commit or roll back the transactions in doubt, as the page says."""
    drivers = ["postgresql+psycopg" if each.is_postgresql else "mysql+pymysql" for each in reals]
    pairs = zip(reals, drivers, strict=True)
    script()["main"](*[real.url.set(drivername=driver) for real, driver in pairs])


async def test_all_are_prepared_before_the_first_is_committed(several: Several) -> None:
    """The `on_commit` functions run after the last COMMIT."""
    done: list[Any] = []
    for number, running in enumerate(several.each):
        for name in ("prepare_twophase", "commit_twophase"):

            def note(*_: Any, name: str = name, number: int = number) -> None:
                done.append((name, number))

            event.listen(engine_of(running), name, note)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("written")
        await several.add("added")
        on_commit(lambda: done.append(several.stored()))
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
    assert (exchange.status, exchange.error) == (200, None)
    assert done == [
        ("prepare_twophase", 0),
        ("prepare_twophase", 1),
        ("commit_twophase", 0),
        ("commit_twophase", 1),
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


async def test_an_engine_in_binds_is_prepared_too(tmp_path: Path) -> None:
    """Its first statement is sent by the flush of the last COMMIT."""
    kinds = {"tests": "psycopg-sync", "more": "psycopg-sync", "mariadb": "pymysql-sync"}
    near, far, other = (real_database(kind, tmp_path, name) for name, kind in kinds.items())
    engine = create_engine(far.url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    database = SyncDatabase(near.url, session_options={"binds": {CHILD: engine}})

    def work() -> None:
        session = database.get_session()
        session.execute(ENTRY.insert().values(note="lost"))
        orphan = Child()
        orphan.entry_id = -1
        session.add(orphan)

    async with database, other.describe() as second:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await to_thread.run_sync(work)
            await Running(other, second).write("lost")
            await respond(send)

        exchange = await get(DBSessionMiddleware(app, database, second, two_phase=True))
    assert isinstance(exchange.error, IntegrityError)
    assert exchange.messages == []
    assert [each.stored() for each in (near, far, other)] == [[], [], []]
    assert [in_doubt(each) for each in (near, far, other)] == [[], [], []]


@pytest.mark.parametrize("several", PAIRS[:2], indirect=True)
async def test_what_mariadb_refuses_to_prepare_is_not_in_doubt(
    several: Several, caplog: pytest.LogCaptureFixture
) -> None:
    """The transaction is rolled back, and no operator is asked for."""
    (refusing,) = (each for each in several.each if each.real.is_mariadb)

    def end_too_early(connection: Connection, name: str) -> None:
        connection.exec_driver_sql(f"XA END '{name}'")

    event.listen(engine_of(refusing), "prepare_twophase", end_too_early)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("lost")
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
    assert isinstance(exchange.error, DBAPIError)
    assert several.stored() == [[], []]
    assert "In doubt" not in caplog.text


@pytest.mark.parametrize(
    ("number", "refused"), [(1399, True), (1999, True), (2000, False), (2999, False), (3000, True)]
)
def test_an_error_without_sqlstate_is_known_by_its_number(number: int, *, refused: bool) -> None:
    """Older drivers of MariaDB give no SQLSTATE; only 2000 to 2999 come from the client."""
    error = sqlite3.OperationalError(number, "XA PREPARE failed")
    assert is_refused(DBAPIError("XA PREPARE", None, error)) is refused


async def test_what_was_prepared_before_another_failed_is_rolled_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two are prepared when the third cannot be prepared: none of them is in doubt."""
    async with several_databases("asyncpg + asyncmy + psycopg", tmp_path) as several:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await several.write("lost")
            await several.each[2].doom()
            await respond(send)

        exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
        assert isinstance(exchange.error, IntegrityError)
        assert [in_doubt(real) for real in several.reals] == [[], [], []]
        assert several.stored() == [[], [], []]
    assert "In doubt" not in caplog.text


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


async def test_a_session_that_is_alone_after_a_rollback_commits_in_one_phase(
    several: Several,
) -> None:
    """The session that was rolled back is the deciding one, but nothing is to be decided."""
    rolled_back, alone = sorted(several.each, key=lambda running: running.real.is_postgresql)
    event.listen(engine_of(alone), "prepare_twophase", lambda *_: pytest.fail("it was prepared"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await rolled_back.write("lost")
        await alone.write("kept")
        await rolled_back.call("rollback")
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
    assert (exchange.status, exchange.error) == (200, None)
    assert (rolled_back.stored(), alone.stored()) == ([], ["kept"])


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


async def test_after_the_deciding_commit_has_failed_nothing_is_committed(
    several: Several, caplog: pytest.LogCaptureFixture
) -> None:
    """The result of that COMMIT is unknown here, and the page finds it in the databases."""
    deciding = several.each[0]
    event.listen(engine_of(deciding), "commit_twophase", lambda *_: deciding.real.kill(), once=True)
    runs: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(scope)
        await several.write("lost")
        on_commit(lambda: runs.append("called"))
        await respond(send)

    middleware = DBSessionMiddleware(app, *several.databases, two_phase=True, attempts=3)
    exchange = await get(middleware)
    assert isinstance(exchange.error, DBAPIError)
    assert (exchange.messages, len(runs)) == ([], 1)
    await several.assert_free()
    names = [in_doubt(real) for real in several.reals]
    assert [len(each) for each in names] == [1, 1]
    errors = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert all(name in error for (name,), error in zip(names, errors, strict=True))
    resolve(*several.reals)
    assert several.stored() == [[], []]


async def test_one_that_is_lost_after_the_deciding_commit_is_stored_in_the_end(
    several: Several, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names the transaction in doubt, and the page commits it."""
    runs: list[Any] = []
    lost = several.each[1]
    event.listen(
        engine_of(lost), "commit_twophase", lambda *_: lost.real.kill(), once=True
    )  # between PREPARE and COMMIT

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(scope)
        await several.write("kept")
        on_commit(lambda: runs.append("called"))
        await respond(send)

    middleware = DBSessionMiddleware(app, *several.databases, two_phase=True, attempts=3)
    exchange = await get(middleware)
    assert isinstance(exchange.error, DBAPIError)
    assert (exchange.messages, len(runs)) == ([], 1)
    await several.assert_free()
    assert several.stored() == [["kept"], []]
    (xid,) = in_doubt(lost.real)
    (error,) = (each for each in caplog.records if each.levelno == logging.ERROR)
    assert xid in error.getMessage()
    resolve(*several.reals)
    assert several.stored() == [["kept"], ["kept"]]


async def test_a_listener_that_fails_after_the_commit_keeps_no_connection(
    several: Several, caplog: pytest.LogCaptureFixture
) -> None:
    """All work is stored, and no transaction is in doubt."""

    def fail(_session: Session) -> None:
        raise LookupError

    held: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("kept")
        for each in several.each:
            event.listen(orm(each), "after_commit", fail)
        try:
            await respond(send)
        finally:
            held.extend(map(checked_out, several.databases))

    exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
    assert isinstance(exchange.error, LookupError)
    assert (held, several.stored()) == ([0, 0], [["kept"], ["kept"]])
    assert "In doubt" not in caplog.text


async def test_one_that_may_be_prepared_keeps_the_deciding_one_prepared(
    several: Several, caplog: pytest.LogCaptureFixture
) -> None:
    """PREPARE has no result if its connection is lost. The page rolls back."""
    lost = several.each[1]
    event.listen(engine_of(lost), "prepare_twophase", lambda *_: lost.real.kill(), once=True)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await several.write("lost")
        await respond(send)

    exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
    assert isinstance(exchange.error, DBAPIError)
    await several.assert_free()
    assert [len(in_doubt(real)) for real in several.reals] == [1, 0]
    assert sum(each.levelno == logging.ERROR for each in caplog.records) == 2
    resolve(*several.reals)
    assert several.stored() == [[], []]


# What a serialization failure looks like, wherever it comes from.
RACE = "DO $$ BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '40001'; END $$"


async def test_what_is_in_doubt_does_not_run_again(several: Several) -> None:
    """No database has committed, and a conflict happened before."""
    runs: list[Any] = []
    for each in several.each:
        event.listen(
            engine_of(each), "commit_twophase", lambda *_, each=each: each.real.kill(), once=True
        )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(scope)
        await several.write("lost")
        for each in several.each:
            if each.real.is_postgresql:
                await in_session(each, lose)
        await respond(send)

    def lose(session: Session) -> None:
        with pytest.raises(DBAPIError, match="lost"), session.begin_nested():
            session.execute(text(RACE))

    await get(DBSessionMiddleware(app, *several.databases, two_phase=True, attempts=3))
    assert (len(runs), several.stored()) == (1, [[], []])
    resolve(*several.reals)
    assert several.stored() == [[], []]


async def test_what_began_first_decides_although_it_was_rolled_back_since(
    tmp_path: Path,
) -> None:
    """MariaDB gets the number of a transaction before it is known which ones take part."""
    async with several_databases("asyncpg + asyncmy + psycopg", tmp_path) as several:
        one, two, three = several.each
        names: list[str] = []
        for each in several.each:
            event.listen(
                engine_of(each), "commit_twophase", lambda _, name, *__: names.append(name)
            )

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await two.write("lost")
            await one.write("kept")
            await three.write("kept")
            await two.call("rollback")
            await respond(send)

        exchange = await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
        assert (exchange.status, exchange.error) == (200, None)
        assert [name.split("_")[-2:] for name in names] == [["1", "3"], ["2", "3"], ["3", "3"]]
        assert len({name.split("_")[2] for name in names}) == 1
        assert max(map(len, names)) <= 64
        assert several.stored() == [["kept"], [], ["kept"]]


async def test_databases_that_begin_at_once_are_one_unit(several: Several) -> None:
    """Two tasks, or threads, may open the first connection of each database together."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.gather(*(each.write(scope["path"]) for each in several.each))
        await respond(send)

    middleware = DBSessionMiddleware(app, *several.databases, two_phase=True)
    paths = [f"/{number}" for number in range(5)]
    for path in paths:
        assert (await get(middleware, path)).error is None
    assert several.stored() == [paths, paths]


async def test_each_commit_of_a_request_is_a_unit_of_its_own(tmp_path: Path) -> None:
    """Transactions in doubt of one COMMIT are not mixed with those of the next."""
    units: list[str] = []
    async with several_databases("asyncpg + asyncmy", tmp_path) as several:
        engine = engine_of(several.each[0])
        event.listen(engine, "prepare_twophase", lambda _, name: units.append(name.split("_")[2]))

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await several.write("first")
            await respond(send)
            await several.write("second")

        await get(DBSessionMiddleware(app, *several.databases, two_phase=True))
        assert len(set(units)) == 2
        assert several.stored() == [["first", "second"]] * 2


async def test_the_script_demands_all_databases(tmp_path: Path) -> None:
    """Without the deciding transaction, the rule would give the wrong answer."""
    async with several_databases("asyncpg + asyncmy", tmp_path) as several:
        (deciding, other) = several.reals
        name = f"asgi_dbsession_{'0' * 32}_1_2"
        with deciding.reader.begin() as connection:
            connection.execute(ENTRY.insert().values(note="lost"))
            connection.exec_driver_sql(f"PREPARE TRANSACTION '{name}'")
        with pytest.raises(SystemExit, match="all 2 databases are needed"):
            resolve(deciding)
        assert in_doubt(deciding) == [name]
        resolve(deciding, other)
        assert (in_doubt(deciding), deciding.stored()) == ([], [])


PROGRAM = """
import asyncio, json, os, signal, sys

from sqlalchemy import Connection, event, text

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware

urls, doomed, name, number = json.loads(sys.argv[1])
databases = [AsyncDatabase(url) for url in urls]

async def app(scope, receive, send):
    for number, database in enumerate(databases):
        session = database.get_session()
        await session.execute(text("INSERT INTO entry (note) VALUES ('kept')"))
        if number == doomed:
            await session.execute(text("INSERT INTO child (entry_id) VALUES (-1)"))
    await send({"type": "http.response.start", "status": 200, "headers": []})

async def main():
    for database in databases:
        await database.startup()
    engine = databases[number].engine.sync_engine
    event.listen(engine, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    scope = {"type": "http", "method": "GET", "path": "/"}
    await DBSessionMiddleware(app, *databases, two_phase=True)(scope, None, None)

asyncio.run(main())
"""
PAIR = ("asyncpg + psycopg", "asyncpg + asyncmy", "asyncmy + asyncpg")


async def kill_between(several: Several, doomed: int | None, name: str, number: int) -> None:
    """Run the program until just before that step on that database, and kill it there."""
    urls = [real.url.render_as_string(hide_password=False) for real in several.reals]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, json.dumps([urls, doomed, name, number])),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert await process.wait() == -signal.SIGKILL
    idle = len(several.reals)  # those of the test itself
    await becomes_true(lambda: sum(real.connections() for real in several.reals) == idle)


@pytest.mark.parametrize("kinds", PAIR)
@pytest.mark.parametrize(
    ("step", "doubtful", "stored"),
    [
        (("prepare_twophase", 0), [0, 0], []),
        (("prepare_twophase", 1), [1, 0], []),
        (("commit_twophase", 0), [1, 1], []),
        (("commit_twophase", 1), [0, 1], ["kept"]),
    ],
)
async def test_the_databases_alone_decide_after_the_process_was_killed(
    tmp_path: Path, kinds: str, step: tuple[str, int], doubtful: list[int], stored: list[str]
) -> None:
    """A crash between any two steps stores all work or nothing, and needs no log."""
    async with several_databases(kinds, tmp_path) as several:
        await kill_between(several, None, *step)
        assert [len(in_doubt(real)) for real in several.reals] == doubtful
        resolve(*several.reals)
        assert [in_doubt(real) for real in several.reals] == [[], []]
        assert several.stored() == [stored, stored]


@pytest.mark.parametrize(("number", "doubtful"), [(1, [1, 1, 0]), (2, [1, 0, 0]), (0, [1, 0, 0])])
async def test_a_rollback_that_is_killed_is_finished_as_a_rollback(
    tmp_path: Path, number: int, doubtful: list[int]
) -> None:
    """The third database refuses PREPARE, and the deciding transaction is rolled back last."""
    async with several_databases("psycopg + asyncmy + asyncpg", tmp_path) as several:
        await kill_between(several, 2, "rollback_twophase", number)
        assert [len(in_doubt(real)) for real in several.reals] == doubtful
        resolve(*several.reals)
        assert [in_doubt(real) for real in several.reals] == [[], [], []]
        assert several.stored() == [[], [], []]


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


def test_the_name_on_the_page_is_one_that_the_script_knows() -> None:
    """A reader who searches for it finds the page."""
    (line,) = PAGE.blocks("text")
    found = script()["NAME"].fullmatch(line.strip())
    assert found.groups()[1:] == ("2", "3")
