"""A unit of work that only reads holds no transaction, and the application sees no difference."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pgbouncer
import pytest
from asgi import get, respond
from conftest import ENTRY, Real, Running, real_database
from several import Entry
from sqlalchemy import (
    CTE,
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    case,
    cast,
    column,
    create_engine,
    event,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
    text,
    union,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, joinedload, mapped_column, relationship
from sqlalchemy.schema import ForeignKey
from sqlalchemy.sql.elements import quoted_name

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DBSessionMiddleware,
    SyncDatabase,
    get_session,
)
from asgi_dbsession.database.options import reads_of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("asked")]
POSTGRESQL = ("asyncpg", "psycopg", "psycopg-sync")
KINDS = (*POSTGRESQL, "asyncmy", "pymysql-sync")

OTHER = Table("entry", MetaData(), Column("id", Integer), Column("note", String))
STATE = text(
    "SELECT state, CASE WHEN xact_start IS NOT NULL THEN 'open' END, "
    "(SELECT least(count(*), 1) FROM pg_locks WHERE pg_locks.pid = pg_stat_activity.pid) "
    "FROM pg_stat_activity WHERE pid = :pid"
)

PLAIN: dict[str, Any] = {
    "columns": select(ENTRY.c.id, ENTRY.c.note),
    "operators": select(ENTRY.c.id).where(
        ENTRY.c.id > 3, or_(ENTRY.c.note == "a", ENTRY.c.id.in_([1, 2]))
    ),
    "order and limit": select(ENTRY).order_by(ENTRY.c.id.desc()).limit(3).offset(1),
    "aggregates": select(func.count(), func.max(ENTRY.c.id), func.sum(ENTRY.c.id)),
    "groups": select(ENTRY.c.note, func.count(ENTRY.c.id)).group_by(ENTRY.c.note),
    "a join": select(ENTRY.c.id).join(OTHER.alias("o"), literal(True)),
    "exists": select(ENTRY.c.id).where(exists().where(ENTRY.c.id == 1)),
    "a union": union(select(ENTRY.c.id), select(ENTRY.c.id)),
    "a subquery": select(select(ENTRY.c.id).subquery().c.id),
    "case and cast": select(case((ENTRY.c.id > 1, cast(ENTRY.c.id, String)), else_="x")),
    "like": select(ENTRY.c.id).where(ENTRY.c.note.like("a%"), ENTRY.c.note.is_not(None)),
    "distinct": select(ENTRY.c.note).distinct(),
}
OTHERS: dict[str, Any] = {
    "now()": select(func.now()),
    "a function": select(func.lower(ENTRY.c.note)),
    "a generic function": select(func.coalesce(ENTRY.c.id, 1)),
    "an advisory lock": select(func.pg_advisory_xact_lock(1)),
    "a setting": select(func.set_config("app.tenant", "1", True)),
    "FOR UPDATE": select(ENTRY.c.id).with_for_update(),
    "text": text("SELECT 1"),
    "a literal column": select(literal_column("1")),
    "a name without quotes": select(column(quoted_name("now()", quote=False))),
    "a part of text": select(ENTRY.c.id).where(text("true")),
    "a common table expression": select(select(ENTRY.c.id).cte().c.id),
    "an operator of one's own": select(ENTRY.c.id.op("+")(1)),
    "a prefix": select(ENTRY.c.id).prefix_with("ALL"),
    "a window": select(func.count().over()),
    "INSERT": ENTRY.insert().values(note="x"),
    "a write in a CTE": select(ENTRY.insert().values(note="y").returning(ENTRY.c.id).cte().c.id),
}
ONLY_ON_POSTGRESQL = ("an advisory lock", "a setting", "a write in a CTE")


def is_in_transaction(connection: Any) -> bool:
    """Return the transaction state that the driver knows without asking the server."""
    driver = connection.connection.driver_connection
    if hasattr(driver, "get_autocommit"):  # MariaDB: each statement begins one if it is off
        return not driver.get_autocommit()
    if hasattr(driver, "is_in_transaction"):
        return bool(driver.is_in_transaction())
    return bool(driver.info.transaction_status.name != "IDLE")


class Watched:
    """Runs statements, and records after each if the server is in a transaction."""

    def __init__(self, running: Running) -> None:
        self.running = running

    async def execute(self, statement: Any) -> bool:
        """Execute a statement, and return True if a transaction is open afterwards."""
        await self.running.execute(statement)
        return is_in_transaction(self.connection)

    @property
    def connection(self) -> Any:
        """What the session uses."""
        session: Any = self.running.database.get_session()
        return getattr(session, "sync_session", session)._companion.connections[-1]

    @property
    def pid(self) -> int:
        """The process of the server behind it."""
        driver = self.connection.connection.driver_connection
        if hasattr(driver, "get_server_pid"):
            return int(driver.get_server_pid())
        return int(driver.info.backend_pid)


async def in_request(running: Running, work: Any, status: int = 200) -> Any:
    """Run a function in a request, and return the exchange."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await work(Watched(running))
        await respond(send, status)

    return await get(DBSessionMiddleware(app, running.database))


@pytest.mark.parametrize("name", PLAIN)
async def test_a_plain_read_begins_no_transaction(running: Running, name: str) -> None:
    """The parts of the statement decide."""
    found = []

    async def work(watched: Watched) -> None:
        found.append(await watched.execute(PLAIN[name]))

    exchange = await in_request(running, work)
    assert (exchange.status, exchange.error, found) == (200, None, [False])
    await running.assert_clean()


@pytest.mark.parametrize("name", OTHERS)
async def test_anything_else_begins_one_and_all_that_follows_is_in_it(
    running: Running, name: str
) -> None:
    """All statements that may have an effect, and all unknown statements, begin a transaction."""
    if running.real.is_mariadb and name in ONLY_ON_POSTGRESQL:
        pytest.skip("MariaDB does not know this statement")
    found = []

    async def work(watched: Watched) -> None:
        found.append(await watched.execute(PLAIN["columns"]))
        found.append(await watched.execute(OTHERS[name]))
        found.append(await watched.execute(PLAIN["columns"]))

    exchange = await in_request(running, work, 409)
    assert (exchange.error, found) == (None, [False, True, True])
    assert running.stored() == []
    await running.assert_clean()


@pytest.mark.parametrize("status", [201, 409])
async def test_a_write_after_reads_is_committed_or_rolled_back_as_ever(
    running: Running, status: int
) -> None:
    """The transaction begins with the write."""

    async def work(watched: Watched) -> None:
        await watched.execute(PLAIN["columns"])
        await running.write("kept")

    exchange = await in_request(running, work, status)
    assert exchange.error is None
    assert running.stored() == (["kept"] if status == 201 else [])
    await running.assert_clean()


@pytest.mark.parametrize("real", POSTGRESQL, indirect=True)
@pytest.mark.parametrize("of", ["the class", "the engine"])
async def test_a_listener_that_executes_the_statements_does_not_store_them_at_once(
    real: Real, of: str
) -> None:
    """SQLAlchemy calls no listener of `do_execute` after one that returns True."""
    kind: Any = SyncDatabase if real.is_sync else AsyncDatabase
    engine: Any = create_engine(real.url) if real.is_sync else create_async_engine(real.url)

    def execute(cursor: Any, statement: str, parameters: Any, _context: Any) -> bool:
        cursor.execute(statement, parameters)
        return True

    async def work(watched: Watched) -> None:
        await watched.execute(PLAIN["columns"])
        await running.write("not kept")

    target = Engine if of == "the class" else getattr(engine, "sync_engine", engine)
    event.listen(target, "do_execute", execute)
    try:
        running = Running(real, kind.from_engine(engine))
        exchange = await in_request(running, work, 409)
    finally:
        event.remove(target, "do_execute", execute)
    assert (exchange.status, running.stored()) == (409, [])
    await running.assert_clean()
    if real.is_sync:
        engine.dispose()
    else:
        await engine.dispose()


async def test_a_connection_goes_back_to_its_pool_as_it_came(running: Running) -> None:
    """The next user of the connection, without this package, gets a normal transaction."""

    async def work(watched: Watched) -> None:
        assert not await watched.execute(PLAIN["columns"])

    await in_request(running, work)
    engine: Any = running.database.engine
    if isinstance(running.database, SyncDatabase):
        with engine.connect() as connection:
            connection.execute(select(ENTRY))
            assert is_in_transaction(connection)
    else:
        async with engine.connect() as connection:
            await connection.execute(select(ENTRY))
            raw = await connection.get_raw_connection()
            assert await connection.run_sync(is_in_transaction), raw


@pytest.mark.parametrize("real", ["asyncpg"], indirect=True)
async def test_a_connection_that_the_application_has_committed_goes_back_without_a_transaction(
    real: Real,
) -> None:
    """SQLAlchemy would not know of this transaction, and this pool sends no ROLLBACK."""

    async def work(_watched: Watched) -> None:
        session: Any = running.database.get_session()
        connection = await session.connection()
        await connection.commit()
        await session.connection()
        await connection.close()

    async with real.describe(pool_size=1, pool_reset_on_return=None) as database:
        running = Running(real, database)
        exchange = await in_request(running, work)
        assert exchange.messages == []
        engine: Any = database.engine
        async with engine.connect() as connection:
            assert not await connection.run_sync(is_in_transaction)


@pytest.mark.parametrize("real", POSTGRESQL, indirect=True)
async def test_a_failed_read_aborts_nothing(running: Running) -> None:
    """No transaction is open that the failed read could abort."""

    async def work(watched: Watched) -> None:
        with pytest.raises(DBAPIError):
            await watched.execute(
                select(ENTRY.c.id / literal(0)).where(literal(1) / literal(0) > 0)
            )
        await running.write("kept")

    exchange = await in_request(running, work, 201)
    assert (exchange.status, exchange.error) == (201, None)
    assert running.stored() == ["kept"]


async def test_a_savepoint_begins_the_transaction(running: Running) -> None:
    """Work in the savepoint is rolled back, and earlier work stays."""

    async def work(watched: Watched) -> None:
        await watched.execute(PLAIN["columns"])
        session: Any = running.database.get_session()
        if isinstance(session, Session):
            with session.begin_nested() as savepoint:
                session.execute(ENTRY.insert().values(note="gone"))
                savepoint.rollback()
        else:
            async with session.begin_nested() as savepoint:
                await session.execute(ENTRY.insert().values(note="gone"))
                await savepoint.rollback()
        await running.write("kept")

    exchange = await in_request(running, work, 201)
    assert exchange.error is None
    assert running.stored() == ["kept"]


@pytest.mark.parametrize("real", POSTGRESQL, indirect=True)
async def test_the_connection_itself_begins_the_transaction(running: Running) -> None:
    """Work below SQLAlchemy (COPY) is rolled back too."""

    async def work(watched: Watched) -> None:
        await watched.execute(PLAIN["columns"])
        session: Any = running.database.get_session()
        if isinstance(session, Session):
            cursor = session.connection().connection.cursor()
            cursor.execute("INSERT INTO entry (note) VALUES ('raw')")
        else:
            connection = await session.connection()
            raw: Any = (await connection.get_raw_connection()).driver_connection
            await raw.execute("INSERT INTO entry (note) VALUES ('raw')")

    exchange = await in_request(running, work, 409)
    assert exchange.error is None
    assert running.stored() == []


@pytest.mark.parametrize("real", POSTGRESQL, indirect=True)
async def test_a_listener_of_the_application_begins_the_transaction(running: Running) -> None:
    """`SET LOCAL` in `after_begin` may be sent below SQLAlchemy, so BEGIN is not delayed."""
    found = []

    def set_tenant(_session: Any, _transaction: Any, connection: Any) -> None:
        connection.exec_driver_sql("SET LOCAL app.tenant = '7'")

    event.listen(Session, "after_begin", set_tenant)
    try:

        async def work(watched: Watched) -> None:
            found.append(await watched.execute(PLAIN["columns"]))
            tenant = await running.execute(text("SELECT current_setting('app.tenant')"))
            found.append(tenant.scalar())

        await in_request(running, work)
    finally:
        event.remove(Session, "after_begin", set_tenant)
    assert found == [True, "7"]


async def test_a_flush_begins_the_transaction_before_its_listeners(running: Running) -> None:
    """A listener of the mapper may write with the driver's own connection."""

    def write(_mapper: Any, connection: Any, _target: Any) -> None:
        cursor = connection.connection.cursor()
        cursor.execute("INSERT INTO entry (note) VALUES ('raw')")
        cursor.close()

    async def work(watched: Watched) -> None:
        await watched.execute(PLAIN["columns"])
        session: Any = running.database.get_session()
        session.add(Entry("added"))
        await running.call("flush")

    event.listen(Entry, "before_insert", write)
    try:
        exchange = await in_request(running, work, 409)
    finally:
        event.remove(Entry, "before_insert", write)
    assert exchange.error is None
    assert running.stored() == []


@pytest.mark.parametrize("real", POSTGRESQL, indirect=True)
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_other_isolation_levels_keep_their_transaction(real: Real, level: str) -> None:
    """At these levels, a second read must see the same rows as the first."""
    found = []
    async with real.describe(isolation_level=level) as database:
        running = Running(real, database)

        async def work(watched: Watched) -> None:
            found.append(await watched.execute(PLAIN["columns"]))

        await in_request(running, work)
    assert found == [True]


WRITE = "INSERT INTO entry (note) VALUES ('lost')"


@pytest.mark.parametrize(
    "statement",
    [
        (ENTRY.insert(), [{"note": "lost"}, {"note": "gone"}]),
        (text(WRITE).execution_options(no_parameters=True),),
    ],
    ids=["many rows", "no parameters"],
)
async def test_a_write_after_a_read_begins_the_transaction(
    running: Running, statement: Any
) -> None:
    """The driver has other methods for many rows, and for SQL text with percent signs."""

    async def work(_: Watched) -> None:
        await running.execute(PLAIN["columns"])
        await running.call("execute", *statement)

    assert (await in_request(running, work, 409)).error is None
    assert running.stored() == []


@pytest.mark.parametrize("of", ["the engine", "its connections"])
async def test_an_engine_in_autocommit_stays_in_autocommit(real: Real, of: str) -> None:
    """A write after a read is stored at once, so a later rollback does not take it back."""
    level: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"}
    options = level if of == "the engine" else {"execution_options": level}
    async with real.describe(**options) as database:
        running = Running(real, database)

        async def work(_: Watched) -> None:
            await running.execute(PLAIN["columns"])
            await running.write("kept")

        await in_request(running, work, 409)
    assert real.stored() == ["kept"]


@pytest.mark.parametrize(
    ("wanted", "level", "expected"),
    [
        (True, None, False),
        (True, "REPEATABLE READ", False),
        (False, None, True),
        (None, None, False),
    ],
)
async def test_autocommit_reads_decides(
    real: Real, wanted: bool | None, level: str | None, *, expected: bool
) -> None:
    """True: at each isolation level. False: never. None: only if nobody sees a difference."""
    expected = expected or (real.is_mariadb and wanted is None)
    found = []
    options = {"isolation_level": level} if level else {}
    async with real.describe(autocommit_reads=wanted, **options) as database:
        running = Running(real, database)

        async def work(watched: Watched) -> None:
            found.append(await watched.execute(PLAIN["columns"]))

        await in_request(running, work)
    assert found == [expected]


@pytest.mark.parametrize("driver", ["aiosqlite", "mysqldb", "mariadbconnector", "pg8000"])
def test_autocommit_reads_is_refused_where_it_cannot_work(driver: str) -> None:
    """The error says which argument to leave out, and which drivers support it."""
    with pytest.raises(
        ConfigurationError, match=r"Leave out `autocommit_reads=True`, or .*asyncmy"
    ):
        reads_of("the database", True, driver)
    with pytest.raises(ConfigurationError, match="Leave out `autocommit_reads=True`"):
        AsyncDatabase("sqlite:///x.db", autocommit_reads=True)


@pytest.mark.parametrize("real", POSTGRESQL, indirect=True)
async def test_a_request_that_reads_and_waits_is_not_idle_in_transaction(running: Running) -> None:
    """Another connection looks at the server meanwhile: no transaction, no snapshot, no lock."""
    seen = []

    async def work(watched: Watched) -> None:
        for _ in range(2):
            await watched.execute(PLAIN["columns"])
            await asyncio.sleep(0.05)
            with running.real.reader.connect() as reader:
                seen.append(tuple(reader.execute(STATE, {"pid": watched.pid}).one()))
        await running.execute(OTHERS["now()"])
        with running.real.reader.connect() as reader:
            seen.append(tuple(reader.execute(STATE, {"pid": watched.pid}).one()))

    exchange = await in_request(running, work)
    assert exchange.error is None
    assert seen == [("idle", None, 0), ("idle", None, 0), ("idle in transaction", "open", 1)]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("wanted", [None, False])
async def test_readers_that_wait_leave_the_connections_of_pgbouncer_to_others(
    tmp_path: Path, driver: str, *, wanted: bool | None
) -> None:
    """Six readers at once on its three connections, which all of them keep for a transaction."""
    real = real_database(driver, tmp_path)
    url = pgbouncer.url_through(real.url).update_query_dict({"pgbouncer": "true"})
    barrier = asyncio.Barrier(6)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = get_session()
        await session.execute(PLAIN["columns"])
        async with asyncio.timeout(20 if wanted is None else 0.5):
            await barrier.wait()
        await session.execute(PLAIN["aggregates"])
        await session.execute(ENTRY.insert().values(note=scope["path"]))
        await respond(send, 201)

    async with AsyncDatabase(url, autocommit_reads=wanted, pool_size=6) as database:
        middleware = DBSessionMiddleware(app, database)
        asked = (get(middleware, f"/{number}") for number in range(6))
        exchanges = await asyncio.gather(*asked)
    if wanted is None:
        assert [each.status for each in exchanges] == [201] * 6
        assert sorted(real.stored()) == [f"/{number}" for number in range(6)]
    else:
        assert {type(each.error) for each in exchanges} & {TimeoutError, asyncio.BrokenBarrierError}


class Base(DeclarativeBase):
    """Classes of two tables, for the SELECTs that the ORM makes."""


class Parent(Base):
    """Has children."""

    __tablename__ = "reads_parent"
    id: Mapped[int] = mapped_column(primary_key=True)
    children: Mapped[list["Child"]] = relationship()


class Child(Base):
    """Has a parent."""

    __tablename__ = "reads_child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey("reads_parent.id"))


@pytest.fixture
async def family(running: Running) -> AsyncIterator[None]:
    """The two tables."""
    with running.real.reader.begin() as connection:
        Base.metadata.create_all(connection)
    yield
    with running.real.reader.begin() as connection:
        Base.metadata.drop_all(connection)


@pytest.mark.usefixtures("asked", "family")
async def test_what_the_orm_loads_is_a_plain_read_too(running: Running) -> None:
    """Entities with eager loading by JOIN."""
    found = []

    async def work(watched: Watched) -> None:
        found.append(await watched.execute(select(Parent)))
        found.append(await watched.execute(select(Parent).options(joinedload(Parent.children))))

    exchange = await in_request(running, work)
    assert (exchange.error, found) == (None, [False, False])


def test_a_cte_is_on_no_list() -> None:
    """An unknown construct is not a plain read, because the list names the known ones."""
    from asgi_dbsession.session.optional.reads import plain  # noqa: PLC0415

    assert CTE not in plain._PLAIN
