"""With `autocommit_reads=True` on MariaDB, reads are sent alone, and no write is stored at once."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from asgi import get, respond
from autocommitting import KINDS, READ, Reading, described
from conftest import ENTRY, Real
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from several import Entry, engine_of
from sqlalchemy import Column, Engine, Integer, MetaData, Table, event, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, Pool, StaticPool
from test_drivers import Rival

from asgi_dbsession import (
    ConfigurationError,
    DBSessionMiddleware,
    SyncDatabase,
    TransactionAborted,
    on_commit,
    safe_methods,
)
from asgi_dbsession.testing import rolled_back

__all__ = ["KINDS"]
pytestmark = pytest.mark.anyio
LOST = "INSERT INTO entry (note) VALUES ('lost')"
WRITE = ENTRY.insert().values(note="lost")
NO_PARAMETERS = {"no_parameters": True}
NOWHERE = Table("nowhere", MetaData(), Column("id", Integer))
SELECT = "SELECT entry.id, entry.note FROM entry"


@pytest.fixture
async def reading(real: Real) -> AsyncIterator[Reading]:
    """A database whose only connection is in autocommit mode."""
    with real.reader.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS made_meanwhile"))
        connection.execute(text("DROP PROCEDURE IF EXISTS write_and_fail"))
        connection.execute(
            text(f"CREATE PROCEDURE write_and_fail() BEGIN {LOST}; SELECT * FROM nowhere; END")
        )
    async with described(real) as database:
        reading = Reading(real, database)
        await reading.read()
        yield reading
        await reading.assert_clean()


def raw(connection: Any, statement: str = LOST) -> None:
    """Send a statement on the driver's own connection, which this package cannot see."""
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()


def fail_in_procedure(connection: Any) -> None:
    """Call a procedure that writes and then fails. The write stays in the transaction."""
    with pytest.raises(Exception, match="nowhere"):
        raw(connection, "CALL write_and_fail()")


def write_in_savepoint(session: Session) -> None:
    with session.begin_nested():
        session.execute(WRITE)


def flush(session: Session) -> None:
    session.add(Entry("lost"))
    session.flush()


def commit_below(session: Session) -> None:
    driver = session.connection().connection
    raw(driver, "COMMIT")
    raw(driver)


def commit_on_connection(session: Session) -> None:
    connection = session.connection()
    connection.commit()
    fail_in_procedure(connection.connection)


def fail_to_read(session: Session) -> None:
    with pytest.raises(DBAPIError):
        session.execute(select(NOWHERE))


def and_write(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def both(session: Session) -> None:
        work(session)
        session.execute(WRITE)

    return both


# Ways to write in a session.
IN_A_SESSION: dict[str, Callable[[Any], Any]] = {
    "INSERT": lambda session: session.execute(WRITE),
    "many rows": lambda session: session.execute(ENTRY.insert(), [{"note": "a"}, {"note": "b"}]),
    "SQL text": lambda session: session.execute(text(LOST)),
    "no parameters": lambda session: session.execute(text(LOST), execution_options=NO_PARAMETERS),
    "an object": flush,
    "a bulk insert": lambda session: session.bulk_insert_mappings(Entry, [{"note": "lost"}]),
    "a savepoint": write_in_savepoint,
    "a procedure": lambda session: fail_in_procedure(session.connection().connection),
    "the connection": lambda session: session.connection().execute(WRITE),
    "the driver's connection": lambda session: raw(session.connection().connection),
    "the connection of a result": lambda session: session.execute(READ).connection.execute(WRITE),
    "FOR UPDATE": and_write(lambda session: session.execute(READ.with_for_update())),
    "a function": and_write(lambda session: session.scalar(select(func.last_insert_id(5)))),
    "a failed read": and_write(fail_to_read),
    # The transaction ends here without SQLAlchemy, and the next statement begins another one.
    "CREATE TABLE": and_write(
        lambda session: session.execute(text("CREATE TABLE made_meanwhile (id INT)"))
    ),
    "COMMIT as SQL text": and_write(lambda session: session.execute(text("COMMIT"))),
    "COMMIT by the driver": commit_below,
    "a commit of the connection": commit_on_connection,
    "a commit of the session": and_write(lambda session: (session.commit(), session.execute(READ))),
}


@pytest.mark.parametrize("first", ["a read", "nothing"])
@pytest.mark.parametrize("name", IN_A_SESSION)
async def test_a_write_in_a_session_is_rolled_back(reading: Reading, name: str, first: str) -> None:
    """The connection was in autocommit mode when the request began."""

    def work(session: Session) -> None:
        if first == "a read":
            session.execute(READ)
        IN_A_SESSION[name](session)

    exchange = await reading.request(work, 409)
    assert (exchange.status, reading.stored()) == (409, [])
    assert await reading.statements_of_a_read() == [SELECT]


def insert_and_close(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(WRITE)


def insert_and_fail(engine: Engine) -> None:
    with suppress(LookupError), engine.begin() as connection:
        connection.execute(WRITE)
        raise LookupError


def write_without_begin(engine: Engine) -> None:
    with engine.connect() as connection:
        raw(connection.connection)


def write_raw(engine: Engine) -> None:
    connection = engine.raw_connection()
    try:
        raw(connection)
    finally:
        connection.close()


def fail_raw(engine: Engine) -> None:
    connection = engine.raw_connection()
    try:
        fail_in_procedure(connection)
    finally:
        connection.close()


def fail_after_commit(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(READ)
        connection.commit()
        fail_in_procedure(connection.connection)


def write_detached(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.detach()
        connection.execute(WRITE)


def write_in_plain_session(engine: Engine) -> None:
    with Session(engine) as session:
        session.execute(READ)
        session.execute(WRITE)


def fail_after_level(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(READ)
    with engine.connect() as connection:
        connection.execution_options(isolation_level="SERIALIZABLE").execute(READ)
    fail_raw(engine)


ON_THE_ENGINE = (
    insert_and_close,
    insert_and_fail,
    write_without_begin,
    write_raw,
    fail_raw,
    fail_after_commit,
    write_detached,
    write_in_plain_session,
    fail_after_level,
)


@pytest.mark.parametrize("work", ON_THE_ENGINE)
async def test_a_write_on_the_engine_is_rolled_back(
    reading: Reading, work: Callable[[Engine], Any]
) -> None:
    """Code that uses `database.engine` gets a connection that is not in autocommit mode."""
    await reading.on_engine(work)
    assert reading.stored() == []
    assert await reading.statements_of_a_read() == [SELECT]


SET_OFF, SET_ON = "SET AUTOCOMMIT = 0", "SET AUTOCOMMIT = 1"
INSERT = "INSERT INTO entry (note) VALUES ('lost')"
READ_ONLY = "START TRANSACTION READ ONLY"
# What the server gets: the work of a request, its status, and all statements.
REQUESTS: dict[str, tuple[Callable[[Any], Any], int, list[str]]] = {
    "reads": (lambda session: (session.execute(READ), session.execute(READ)), 200, [SELECT] * 2),
    "reads, and fails": (lambda session: session.execute(READ), 404, [SELECT]),
    "nothing": (lambda _: None, 200, []),
    "a write": (lambda session: session.execute(WRITE), 201, [SET_OFF, INSERT, "COMMIT", SET_ON]),
    "a read and a write": (
        lambda session: (session.execute(READ), session.execute(WRITE), session.execute(READ)),
        201,
        [SELECT, SET_OFF, INSERT, SELECT, "COMMIT", SET_ON],
    ),
    "a write, and fails": (
        lambda session: session.execute(WRITE),
        409,
        [SET_OFF, INSERT, "ROLLBACK", SET_ON],
    ),
    "a commit of its own": (
        lambda session: (session.execute(WRITE), session.commit()),
        201,
        [SET_OFF, INSERT, "COMMIT", "ROLLBACK", SET_ON],
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_the_server_gets_no_more_than_it_needs(reading: Reading, name: str) -> None:
    """Plain reads are sent alone. A write costs one more round trip than without the option."""
    work, status, expected = REQUESTS[name]

    async def serve() -> None:
        assert (await reading.request(work, status)).status == status

    assert await reading.sent(serve) == expected
    assert await reading.statements_of_a_read() == [SELECT]


async def test_without_the_option_each_read_has_a_transaction(real: Real) -> None:
    """By default, nothing changes on MariaDB."""
    for wanted in (None, False):
        async with described(real, autocommit_reads=wanted) as database:
            sent = await Reading(real, database).statements_of_a_read()
        assert sent == [SELECT, "COMMIT", "ROLLBACK"]


async def test_a_request_that_may_only_read_is_refused_a_write_by_the_server(
    reading: Reading,
) -> None:
    """The server hears that the transaction is read-only when it begins, after the reads."""

    def work(session: Session) -> None:
        session.execute(READ)
        session.execute(text("SELECT 42"))
        with pytest.raises(DBAPIError, match="READ ONLY"):
            session.execute(text(LOST))

    exchange = []

    async def serve() -> None:
        exchange.append(await reading.request(work, read_only=safe_methods))

    sent = await reading.sent(serve)
    assert sent == [SELECT, SET_OFF, READ_ONLY, "SELECT 42", LOST, "ROLLBACK", SET_ON]
    assert exchange[0].error is not None
    assert reading.stored() == []


async def test_a_level_does_not_allow_writes_in_a_request_that_may_only_read(
    reading: Reading,
) -> None:
    """The server refuses them even in autocommit mode."""

    def work(session: Session) -> None:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        with pytest.raises(DBAPIError, match="READ ONLY"):
            session.execute(text(LOST))

    assert (await reading.request(work, read_only=safe_methods)).error is not None
    assert reading.stored() == []


@pytest.mark.parametrize("work", [insert_and_close, insert_and_fail, write_raw])
async def test_after_code_that_uses_the_engine_reads_are_sent_alone(
    reading: Reading, work: Callable[[Engine], Any]
) -> None:
    """The connection is switched to autocommit mode when it returns to the pool."""
    await reading.on_engine(work)
    assert await reading.sent(reading.read) == [SELECT]


async def test_no_transaction_is_open_between_reads(reading: Reading) -> None:
    """Another connection looks at the server meanwhile."""
    found = []
    query = text("SELECT count(*) FROM information_schema.innodb_trx")

    def work(session: Session) -> None:
        for statement in (READ, READ, WRITE):
            session.execute(statement)
            time.sleep(0.2)  # the server keeps the content of this view for a tenth of a second
            with reading.real.reader.connect() as reader:
                found.append(reader.scalar(query))

    await reading.request(work)
    assert found == [0, 0, 1]


@pytest.mark.parametrize("of", ["the class", "the engine"])
@pytest.mark.parametrize("name", ["after_begin", "begin", "engine_connect", "checkout"])
async def test_what_a_listener_writes_is_rolled_back(real: Real, name: str, of: str) -> None:
    """A listener may write on the driver's own connection, which this package cannot see."""
    written: list[bool] = []
    is_ready = asyncio.Event()

    def listener(*arguments: Any) -> None:
        if is_ready.is_set() and not written:
            written.append(True)
            raw(arguments[0] if name == "checkout" else arguments[-1].connection)

    async with described(real) as database:
        engine: Any = database.engine
        target: Any = getattr(engine, "sync_engine", engine)
        if of == "the class" or name == "after_begin":
            target = {"after_begin": Session, "checkout": Pool}.get(name, Engine)
        event.listen(target, name, listener)
        try:
            reading = Reading(real, database)
            await reading.read()
            is_ready.set()
            exchange = await reading.request(lambda session: session.execute(READ), 409)
        finally:
            event.remove(target, name, listener)
        await reading.assert_clean()
    assert (exchange.status, written, real.stored()) == (409, [True], [])


@pytest.mark.parametrize(("status", "stored"), [(200, ["lost"]), (409, [])])
async def test_a_transaction_that_a_listener_begins_ends_with_the_request(
    reading: Reading, status: int, stored: list[str]
) -> None:
    """The server tells of a transaction that this package cannot see."""

    def begin(connection: Any, *_: Any) -> None:
        raw(connection.connection, "START TRANSACTION")
        raw(connection.connection)

    event.listen(engine_of(reading), "after_cursor_execute", begin, once=True)
    exchange = await reading.request(lambda session: session.execute(READ), status)
    assert (exchange.status, reading.stored()) == (status, stored)
    await reading.assert_clean()


@pytest.mark.parametrize("first", ["a read", "nothing"])
async def test_what_a_listener_of_a_flush_writes_is_rolled_back(
    reading: Reading, first: str
) -> None:
    """A transaction begins before the listeners of the mapper are called."""

    def write(_mapper: Any, connection: Any, _target: Any) -> None:
        raw(connection.connection)

    def work(session: Session) -> None:
        if first == "a read":
            session.execute(READ)
        session.add(Entry("added"))
        session.flush()

    event.listen(Entry, "before_insert", write)
    try:
        exchange = await reading.request(work, 409)
    finally:
        event.remove(Entry, "before_insert", write)
    assert (exchange.status, reading.stored()) == (409, [])


async def test_what_another_engine_writes_meanwhile_is_rolled_back(
    reading: Reading,
) -> None:
    """A listener for `do_connect` uses a second engine, while a session waits for a connection."""
    used = []

    def connect(*_: Any) -> None:
        write_raw(other)
        used.append(True)

    async with described(reading.real) as second:
        await Reading(reading.real, second).read()
        other: Any = second.engine
        other = getattr(other, "sync_engine", other)
        database = described(
            reading.real,
            on_engine=lambda engine: event.listen(engine, "do_connect", connect),
            ping_on_startup=False,
        )
        async with database:
            await Reading(reading.real, database).read()
    assert (used, reading.stored()) == ([True], [])


async def test_opentelemetry_does_not_switch_it_off(real: Real) -> None:
    """Its listeners for the pool send nothing."""

    def instrument(engine: Engine) -> None:
        SQLAlchemyInstrumentor().instrument(engine=engine, skip_dep_check=True)

    async with described(real, on_engine=instrument) as database:
        assert await Reading(real, database).statements_of_a_read() == [SELECT]
    SQLAlchemyInstrumentor().uninstrument()


@pytest.mark.parametrize("real", ["asyncmy", "aiomysql"], indirect=True)
async def test_what_a_task_writes_that_began_meanwhile_is_rolled_back(real: Real) -> None:
    """A listener for `do_connect` starts a task, while a session waits for a connection."""
    tasks, may_write = [], asyncio.Event()

    async def write_later() -> None:
        await may_write.wait()
        await running.on_engine(write_raw)

    def connect(*_: Any) -> None:
        tasks.append(asyncio.get_running_loop().create_task(write_later()))

    database = described(
        real,
        on_engine=lambda engine: event.listen(engine, "do_connect", connect),
        ping_on_startup=False,
    )
    async with database:
        running = Reading(real, database)
        for _ in range(2):
            await running.read()
        may_write.set()
        await asyncio.gather(*tasks)
    assert (len(tasks), real.stored()) == (1, [])


@pytest.mark.parametrize("level", ["SERIALIZABLE", "READ UNCOMMITTED"])
async def test_a_level_of_one_request_is_a_transaction(reading: Reading, level: str) -> None:
    """SQLAlchemy switches autocommit off to set the level, and again to reset the level."""

    def work(session: Session) -> None:
        session.connection(execution_options={"isolation_level": level})
        session.execute(READ)
        session.execute(WRITE)

    assert (await reading.request(work, 409)).status == 409
    assert reading.stored() == []
    await reading.on_engine(fail_raw)
    assert (await reading.request(IN_A_SESSION["INSERT"], 409)).status == 409
    assert reading.stored() == []
    assert await reading.statements_of_a_read() == [SELECT]


def in_autocommit_at_first(session: Any) -> None:
    session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    session.execute(READ)
    session.execute(WRITE)


def in_autocommit_after_reads(session: Any) -> None:
    connection = session.execute(READ).connection
    connection.rollback()
    connection.execution_options(isolation_level="AUTOCOMMIT").execute(WRITE)


@pytest.mark.parametrize("work", [in_autocommit_at_first, in_autocommit_after_reads])
async def test_autocommit_that_the_application_wants_stores_at_once(
    reading: Reading, work: Callable[[Any], Any]
) -> None:
    """The level AUTOCOMMIT of a connection is obeyed, and ends with the request."""
    await reading.request(work, 409)
    assert reading.stored() == ["lost"]
    reading.clear()
    await reading.on_engine(write_raw)
    assert reading.stored() == []


async def test_an_engine_in_autocommit_stays_in_autocommit(real: Real) -> None:
    """A write after a read is stored at once, so a later rollback does not take it back."""
    async with described(real, isolation_level="AUTOCOMMIT") as database:
        reading = Reading(real, database)
        work = IN_A_SESSION["the connection of a result"]
        assert (await reading.request(work, 409)).status == 409
        assert reading.stored() == ["lost"]


@pytest.mark.parametrize("level", [None, "REPEATABLE READ", "SERIALIZABLE"])
async def test_at_other_levels_reads_are_sent_alone_too(real: Real, level: str | None) -> None:
    """The application has asked for it."""
    options = {"isolation_level": level} if level else {}
    async with real.describe(autocommit_reads=True, pool_size=1, **options) as database:
        reading = Reading(real, database)
        assert await reading.statements_of_a_read() == [SELECT]
        assert (await reading.request(IN_A_SESSION["INSERT"], 409)).status == 409
        assert reading.stored() == []


def roll_back_twice(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(READ)
        connection.rollback()
        connection.execute(WRITE)
        connection.rollback()


def detach_and_write(session: Any) -> None:
    connection = session.execute(READ).connection
    connection.detach()
    connection.execute(WRITE)


async def test_a_detached_connection_begins_a_transaction(reading: Reading) -> None:
    """The application has taken it from the pool, after it was used for reads."""
    assert (await reading.request(detach_and_write, 409)).status == 409
    assert reading.stored() == []


@pytest.mark.parametrize("setting", ["rollback", "commit", None])
async def test_what_the_pool_does_with_a_returned_connection_is_obeyed(
    real: Real, setting: str | None
) -> None:
    """SQLAlchemy's option `pool_reset_on_return` decides about work that nobody has ended."""
    async with described(real, pool_reset_on_return=setting) as database:
        reading = Reading(real, database)
        await reading.read()
        await reading.on_engine(write_raw)
        await reading.read()
        assert reading.stored() == (["lost"] if setting == "commit" else [])
        reading.clear()
        await reading.on_engine(write_raw)
        if setting == "commit":
            reading.clear()
        await reading.on_engine(roll_back_twice)
        assert reading.stored() == []
        assert (await reading.request(IN_A_SESSION["INSERT"], 409)).status == 409
        assert reading.stored() == []
        await reading.assert_clean()


async def test_a_deadlock_stores_nothing_that_follows(real: Real) -> None:
    """The deadlock has ended the transaction, and the application goes on."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await reading.execute(READ)
        await reading.write("before")
        with pytest.raises(DBAPIError, match=r"(?i)deadlock"):
            await rival.deadlock()
        await reading.write("after")
        await respond(send, 201)

    async with described(real, pool_size=2) as database:
        reading = Reading(real, database)
        await reading.read()
        async with Rival(reading) as rival:
            exchange = await get(DBSessionMiddleware(app, database))
        assert isinstance(exchange.error, TransactionAborted)
        assert not {"before", "after"} & set(reading.stored())
        await reading.assert_clean()


async def test_a_connection_that_was_lost_is_replaced(reading: Reading) -> None:
    """The server has ended it in the pool, and between a read and a write."""
    reading.real.kill()
    await reading.on_engine(insert_and_close)
    assert reading.stored() == []
    await reading.read()

    def lose_and_write(session: Session) -> None:
        session.execute(READ)
        reading.real.kill()
        session.execute(WRITE)

    exchange = await reading.request(lose_and_write, 201)
    assert isinstance(exchange.error, DBAPIError)
    assert exchange.error.connection_invalidated
    assert (await reading.request(IN_A_SESSION["INSERT"], 409)).status == 409
    assert reading.stored() == []
    assert await reading.statements_of_a_read() == [SELECT]


@pytest.mark.parametrize("lose", ["flush", "connection"])
async def test_a_connection_that_was_lost_before_a_begin_raises_the_error_of_sqlalchemy(
    reading: Reading, lose: str
) -> None:
    """A transaction begins here before any statement, and the connection was lost."""

    def work(session: Session) -> None:
        session.execute(READ)
        reading.real.kill()
        session.add(Entry("lost"))
        getattr(session, lose)()

    exchange = await reading.request(work, 201)
    assert isinstance(exchange.error, DBAPIError)
    assert exchange.error.connection_invalidated
    assert await reading.statements_of_a_read() == [SELECT]
    assert reading.stored() == []


@pytest.mark.parametrize("of", ["the middleware", "the session"])
async def test_two_phases_are_a_transaction(real: Real, of: str) -> None:
    """XA START is sent outside of autocommit mode."""
    options: Any = {"session_options": {"twophase": True}} if of == "the session" else {}
    async with described(real, **options) as database:
        reading = Reading(real, database)
        await reading.on_engine(lambda engine: engine.connect().close())
        for status, expected in ((409, []), (201, ["lost"])):
            work = IN_A_SESSION["the connection of a result"]
            exchange = await reading.request(work, status, two_phase=of == "the middleware")
            assert (exchange.error, exchange.status) == (None, status)
            assert reading.stored() == expected
        await reading.assert_clean()


async def test_blocks_are_rolled_back(reading: Reading) -> None:
    """A block of its own, a joined block, and a block that may only read."""
    database: Any = reading.database

    async def read_and_write() -> None:
        await reading.execute(READ)
        await reading.execute(WRITE)

    with suppress(LookupError):
        async with entered(database.begin()):
            await read_and_write()
            raise LookupError
    assert reading.stored() == []
    async with entered(database.begin()):
        await reading.execute(READ)
        with suppress(LookupError):
            async with entered(database.begin(join=True)):
                await read_and_write()
                raise LookupError
        await reading.write("kept")
    assert reading.stored() == ["kept"]
    assert await reading.statements_of_a_read() == [SELECT]


@asynccontextmanager
async def entered(block: Any) -> AsyncIterator[None]:
    """Enter a block, blocking or not."""
    if hasattr(block, "__aenter__"):
        async with block:
            yield
    else:
        with block:
            yield


async def test_each_attempt_is_rolled_back_whole(reading: Reading) -> None:
    """`run_transaction` and `attempts` begin again with reads, which are sent alone."""
    tried = []

    def work(session: Session) -> None:
        tried.append(session.scalars(READ.with_only_columns(ENTRY.c.note)).all())
        session.add(Entry(f"attempt {len(tried)}"))
        session.flush()
        if len(tried) < 3:
            raise LookupError

    exchange = await reading.request(work, 201, attempts=3, retry_on=LookupError)
    assert (exchange.status, tried) == (201, [[], [], []])
    assert reading.stored() == ["attempt 3"]


async def test_a_function_after_commit_has_a_transaction_of_its_own(reading: Reading) -> None:
    """It is called after COMMIT, when the connection is in autocommit mode again."""
    done = []

    def fail() -> None:
        database: Any = reading.database
        with suppress(LookupError), database.begin() as session:
            IN_A_SESSION["the connection of a result"](session)
            raise LookupError
        done.append(True)

    async def fail_async() -> None:
        database: Any = reading.database
        with suppress(LookupError):
            async with database.begin() as session:
                await session.run_sync(IN_A_SESSION["the connection of a result"])
                raise LookupError
        done.append(True)

    def work(session: Session) -> None:
        session.execute(READ)
        session.execute(ENTRY.insert().values(note="kept"))
        on_commit(fail if isinstance(reading.database, SyncDatabase) else fail_async)

    assert (await reading.request(work, 201)).status == 201
    assert (done, reading.stored()) == ([True], ["kept"])


async def test_a_connection_of_the_application_is_rolled_back_after_its_commit(
    reading: Reading,
) -> None:
    """This package has sent COMMIT on it, but does not return it to the pool."""
    lent: list[Any] = []

    def lend(session: Any) -> None:
        connection = session.bind.connect()
        session.execute(READ, bind_arguments={"bind": connection})
        lent.append(connection)

    def use_on(connection: Any) -> None:
        fail_in_procedure(connection.connection)
        connection.close()

    assert (await reading.request(lend)).status == 200
    await reading.on_engine(lambda _: use_on(lent[0]))
    assert reading.stored() == []
    assert await reading.statements_of_a_read() == [SELECT]


async def test_inside_of_rolled_back_all_share_one_transaction(reading: Reading) -> None:
    """Everything is rolled back, and the connection is as before afterwards."""
    async with rolled_back(reading.database):
        for _ in range(2):
            assert (await reading.request(IN_A_SESSION["INSERT"], 409)).status == 409
            await reading.read()
        work = IN_A_SESSION["the connection of a result"]
        assert (await reading.request(work, 201)).status == 201
        rows = await reading.on_engine(select_all)
        assert [row.note for row in rows] == ["lost"]
    assert reading.stored() == []
    await reading.on_engine(write_raw)
    assert reading.stored() == []


def select_all(engine: Engine) -> Any:
    with engine.connect() as connection:
        return connection.execute(READ).all()


async def test_each_session_needs_a_connection_of_its_own(real: Real) -> None:
    """With one connection for all, a session would switch the mode of another one."""
    options = {"poolclass": StaticPool, "autocommit_reads": True}
    with pytest.raises(ConfigurationError, match="Leave out `poolclass=StaticPool`"):
        await real.describe(**options).startup()


async def test_without_a_pool_each_session_has_a_new_connection(real: Real) -> None:
    """It works, but the switch is sent for each connection."""
    async with real.describe(autocommit_reads=True, poolclass=NullPool) as database:
        reading = Reading(real, database)
        assert SELECT in await reading.statements_of_a_read()
        for work in (IN_A_SESSION["INSERT"], IN_A_SESSION["the connection of a result"]):
            assert (await reading.request(work, 409)).status == 409
        await reading.on_engine(write_raw)
        assert reading.stored() == []


async def test_many_requests_at_once(real: Real) -> None:
    """Readers, writers, and code that uses the engine change places on few connections."""

    def work(number: int) -> Any:
        statement = f"INSERT INTO entry (note) VALUES ('{number}')"

        def write(session: Session) -> None:
            session.execute(READ)
            session.execute(text(statement))

        def write_below(engine: Engine) -> None:
            connection = engine.raw_connection()
            try:
                raw(connection, statement)
            finally:
                connection.close()

        if number % 3 == 0:
            return running.on_engine(write_below)
        if number % 3 == 1:
            return running.request(write, 409)
        return running.request(lambda session: session.execute(READ))

    async with described(real, pool_size=3) as database:
        running = Reading(real, database)
        await asyncio.gather(*map(work, range(90)))
        assert running.stored() == []
        await running.assert_clean()
