"""After a request, nothing of it is kept: not by pooled connections, nor by the package."""

import asyncio
import gc
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from asgi import Exchange, Socket, respond
from conftest import ENTRY, WITH_MARIADB, Running, becomes_true, checked_out, real_database
from sqlalchemy import make_url, select, text
from sqlalchemy.ext.asyncio import create_async_engine
from test_retry import lose

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, on_commit
from asgi_dbsession.live import LivePage
from asgi_dbsession.unit.current import current_unit

pytestmark = pytest.mark.anyio
KINDS = WITH_MARIADB


class Thing:
    """What a request holds, and a test can follow."""


request_of: ContextVar[Thing] = ContextVar("request_of")


class Case:
    """An application whose handler holds things, and how its request ends.

    Args:
        running: Where.
        how: What becomes of the request.
        has_task: Whether it starts a task that outlives the request.
    """

    def __init__(self, running: Running, how: str, *, has_task: bool = False) -> None:
        self.running, self.how, self.runs, self.has_task = running, how, 0, has_task
        self.held: list[tuple[str, ref[Any]]] = []
        self.waits = asyncio.Event()
        self.tasks: list[asyncio.Task[Any]] = []

    def hold(self, scope: Any) -> Any:
        held: dict[str, Any] = {
            "scope": scope["held"],
            "unit": current_unit.get(),
            "context": Thing(),
            "frame": Thing(),
        }
        request_of.set(held["context"])
        self.held += [(name, ref(each)) for name, each in held.items()]
        if self.has_task:
            self.tasks.append(asyncio.create_task(asyncio.Event().wait()))
        return held["frame"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        frame = self.hold(scope)
        await receive()
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
        await self.running.write(f"{self.how} {self.runs}")
        await self.running.execute(select(ENTRY))
        await getattr(self, self.how)(send)
        if scope["type"] == "http":
            await respond(send, 201)
        del frame

    async def succeeds(self, send: Any) -> None:
        on_commit(lambda: None)

    async def fails_to_commit(self, send: Any) -> None:
        await self.running.doom()

    async def raises(self, send: Any) -> None:
        raise LookupError(Thing())

    async def is_run_again(self, send: Any) -> None:
        if self.runs == 1:
            await lose(self.running)

    async def is_refused_by_the_database(self, send: Any) -> None:
        await self.running.execute(text("SELECT nothing FROM nowhere"))

    async def is_cancelled(self, send: Any) -> None:
        self.waits.set()
        await asyncio.Event().wait()


HOW = [name for name in vars(Case) if name != "hold" and not name.startswith("_")]
OPTIONS: list[dict[str, Any]] = [{}, {"attempts": 3, "retry_after": 1, "on_report": str}]


class Scope(dict[str, Any]):
    """A scope that a test can follow."""


async def serve(exchange: Any, case: Case) -> None:
    """Serve it in a task with a context of its own, as a server does."""
    exchange.scope = exchange.scope["held"] = Scope(exchange.scope)
    serving = asyncio.create_task(exchange.run())
    if case.how == "is_cancelled":
        await case.waits.wait()
        serving.cancel()
    await asyncio.wait([serving])


def left(case: Case) -> list[str]:
    """What is left of its requests now."""
    assert case.held
    gc.collect()
    return [name for name, each in case.held if each() is not None]


async def alive(case: Case, *names: str) -> list[str]:
    """What is left of its requests; a worker thread lets go of its last call in its own time."""
    for _ in range(50):
        found = [name for name in left(case) if not names or name in names]
        if not found:
            break
        await asyncio.sleep(0.01)
    return found


async def empty(database: Any) -> None:
    """Close the pooled connections, so that the next request opens one."""
    disposed = database.engine.dispose()
    if disposed is not None:
        await disposed


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "with options"])
async def test_a_pooled_connection_keeps_nothing_of_the_request_that_opened_it(
    running: Running, how: str, options: dict[str, Any]
) -> None:
    """The scope, the unit of work, the context variables and the frames are free."""
    await empty(running.database)
    case = Case(running, how)
    page = LivePage(running.database) if options else None
    await serve(Exchange(DBSessionMiddleware(case, running.database, **options)), case)
    assert await alive(case) == []
    del page


@pytest.mark.parametrize("real", ["sqlite", "asyncpg", "psycopg", "asyncmy"], indirect=True)
@pytest.mark.parametrize("how", ["succeeds", "fails_to_commit", "raises", "is_cancelled"])
async def test_a_pooled_connection_keeps_nothing_of_a_socket(running: Running, how: str) -> None:
    """The same for a WebSocket."""
    await empty(running.database)
    case = Case(running, how)
    await serve(Socket(DBSessionMiddleware(case, running.database)), case)
    assert await alive(case) == []


@pytest.mark.parametrize("real", ["asyncpg", "psycopg-sync"], indirect=True)
@pytest.mark.parametrize("how", HOW)
async def test_a_task_that_outlives_its_request_keeps_no_scope_and_no_frames(
    running: Running, how: str
) -> None:
    """It keeps the context, as any task does; an error in there has frames no more."""
    case = Case(running, how, has_task=True)
    await serve(Exchange(DBSessionMiddleware(case, running.database, attempts=2)), case)
    assert await alive(case, "scope", "frame") == []
    assert "context" in left(case)
    case.tasks[0].cancel()


@pytest.mark.parametrize("kind", ["asyncpg", "asyncmy"])
@pytest.mark.parametrize("way", ["async_creator", "from_engine", "creator"])
async def test_it_is_the_same_however_an_engine_connects(
    kind: str, way: str, tmp_path: Path
) -> None:
    """Also for an engine of the application's own, and for functions that connect."""
    real = real_database(kind, tmp_path)
    database = real.describe()
    engine: Any = None

    async def connect() -> Any:
        arguments = make_url(real.url).translate_connect_args(username="user")
        if kind == "asyncpg":
            arguments["host"] = real.url.query["host"]
        else:
            arguments["db"] = arguments.pop("database")
            arguments |= real.url.query
        return await import_module(kind).connect(**arguments)

    def connect_adapted() -> Any:
        return engine.sync_engine.dialect.dbapi.connect(async_creator_fn=connect)

    if way == "async_creator":
        database = real.describe(async_creator=connect)
    else:
        options = {"creator": connect_adapted} if way == "creator" else {}
        engine = create_async_engine(real.url, **options)
        database = AsyncDatabase.from_engine(engine, ping_on_startup=False)
    async with database:
        running = Running(real, database)
        await empty(database)
        case = Case(running, "succeeds")
        await serve(Exchange(DBSessionMiddleware(case, database)), case)
        assert real.stored() == ["succeeds 1"]
        assert await alive(case) == []
        await real.assert_clean(database)
    if engine is not None:
        await engine.dispose()
    real.reader.dispose()


async def test_an_engine_of_ones_own_connects_as_before_afterwards() -> None:
    """Nothing of the package is left on its driver."""
    engine = create_async_engine("postgresql+asyncpg://app@db/shop")
    driver: Any = engine.sync_engine.dialect.dbapi
    before = driver.connect
    database = AsyncDatabase.from_engine(engine)
    assert driver.connect != before
    del database
    gc.collect()
    assert driver.connect == before


# Not psycopg and aiosqlite (with SQLAlchemy 2.0), which leave a connection that was interrupted to
# its last reference.
@pytest.mark.parametrize("real", ["asyncpg", "asyncmy"], indirect=True)
async def test_a_connection_that_is_cancelled_while_it_opens_is_not_left_behind(
    running: Running,
) -> None:
    """At whatever turn of the event loop, the last one included."""
    database: Any = running.database

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(1))
        await respond(send)

    middleware = DBSessionMiddleware(app, database)
    for turns in range(200):
        await empty(database)
        serving = asyncio.create_task(Exchange(middleware).run())
        for _ in range(turns):
            await asyncio.sleep(0)
        serving.cancel()
        await asyncio.wait([serving])
        assert checked_out(database) == 0
    await empty(database)
    await becomes_true(lambda: running.real.connections() == 0)


async def test_a_closed_session_is_not_in_the_registry_of_sqlalchemy(running: Running) -> None:
    """Its callback there would swallow the exception of a signal handler."""
    registry = import_module("sqlalchemy.orm.session")._sessions
    keys: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        session: Any = running.database.get_session()
        keys.append(getattr(session, "sync_session", session).hash_key)
        assert keys[0] in registry
        sessions.append(session)
        await respond(send)

    sessions: list[Any] = []
    await Exchange(DBSessionMiddleware(app, running.database)).run()
    assert keys[0] not in registry
    assert running.stored() == ["kept"]
