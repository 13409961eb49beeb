"""Tests that the live page names the right line, refuses strangers, and shows no values."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import postgres
import pytest
from anyio import to_thread
from asgi import Exchange, Life, Socket
from conftest import becomes_true, checked_out
from fastapi import FastAPI
from litestar import Litestar, asgi, get as litestar_get
from litestar.middleware import DefineMiddleware
from pages import Page
from quart import Quart
from several import Entry
from sqlalchemy import Column, Integer, MetaData, String, Table, select, text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DBSessionMiddleware,
    SyncDatabase,
    get_session,
)
from asgi_dbsession.live import LivePage
from asgi_dbsession.live.shown import without_values

pytestmark = pytest.mark.anyio

ITEM = Table(
    "item", MetaData(), Column("id", Integer, primary_key=True), Column("note", String(80))
)
SECRET = "hunter2secret"
IDLE_LINE, LOOP_LINE = "# the connection is idle after this line", "# one statement for each item"
EVENTS = b"events"


async def fast(_request: Request) -> Response:
    await get_session().execute(select(ITEM))
    return PlainTextResponse("fast")


async def sleepy(_request: Request) -> Response:
    await get_session().execute(select(ITEM).limit(1))  # the connection is idle after this line
    await asyncio.sleep(0.8)
    await get_session().execute(select(ITEM).limit(1))
    return PlainTextResponse("slept")


async def many(_request: Request) -> Response:
    for number in (await get_session().scalars(select(ITEM.c.id))).all():
        one = select(ITEM).where(ITEM.c.id == number)
        await get_session().execute(one)  # one statement for each item
    return PlainTextResponse("many")


async def secretive(request: Request) -> Response:
    """Write the secret to every place where an application might have it."""
    session = get_session()
    await session.execute(select(ITEM).where(ITEM.c.note == request.path_params["token"]))
    await session.execute(select(ITEM).where(ITEM.c.note.in_([SECRET, f"{SECRET}2"])))
    await session.execute(text(f"SELECT 1 -- {SECRET}"))
    await session.execute(text(f"SELECT '{SECRET}', 'it''s', '{SECRET}'"))
    await session.execute(text(f"SELECT $${SECRET}$$, $a${SECRET}$a$ /* {SECRET} */"))
    await session.execute(ITEM.insert().values(note=SECRET))
    raise RuntimeError(SECRET)


async def refused(_request: Request) -> Response:
    await get_session().execute(ITEM.insert().values(note="x"))
    return PlainTextResponse("no", status_code=409)


ROUTES = [
    Route("/fast", fast),
    Route("/sleepy", sleepy),
    Route("/many", many),
    Route("/secret/{token}", secretive, methods=["GET", "POST"]),
    Route("/refused", refused),
]


class Served:
    """An application with a page at `/db`."""

    def __init__(self, url: Any, **options: Any) -> None:
        self.database = AsyncDatabase(url, pool_size=5, max_overflow=0, pool_timeout=10)
        self.page = LivePage(self.database, **options)
        self.app: Any = Starlette(routes=ROUTES)
        self.app.mount("/db", self.page)
        self.app = DBSessionMiddleware(self.app, self.database)

    async def ask(self, path: str, **changes: Any) -> Exchange:
        """Send one request, by default from this machine."""
        return await asked(self.app, path, **changes).run()

    async def facts(self) -> Any:
        """Return the data that the page gives to scripts."""
        return json.loads((await self.ask("/db/json")).body)


def asked(app: Any, path: str, **changes: Any) -> Exchange:
    """Send a request with a changed scope."""
    headers = changes.pop("headers", ())
    exchange = Exchange(app, path, method=changes.pop("method", "GET"))
    exchange.scope["headers"] = [(b"host", changes.pop("host", b"localhost:8000")), *headers]
    exchange.scope.update(changes)
    return exchange


def header(exchange: Exchange, name: bytes) -> bytes:
    """Return a header of a response."""
    found: bytes = dict(exchange.messages[0]["headers"])[name]
    return found


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Served]:
    """The application, on PostgreSQL, with thirty items."""
    url = postgres.new_database("live").set(drivername="postgresql+asyncpg")
    served = Served(url, **options)
    async with served.database:
        async with served.database.engine.begin() as connection:
            await connection.run_sync(ITEM.metadata.create_all)
            await connection.execute(ITEM.insert(), [{"note": "x"}] * 30)
        yield served
        assert checked_out(served.database) == 0


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """The application, on PostgreSQL, with thirty items."""
    async with serving() as found:
        yield found


def line_of(mark: str) -> str:
    """Return the line of this file that ends with this text, as the page names lines."""
    with Path(__file__).open() as file:
        (number,) = [n for n, each in enumerate(file, 1) if each.rstrip().endswith(f"  {mark}")]
    return f"test_live.py:{number}"


# What the page shows


async def test_under_load_it_names_the_guilty_line(served: Served) -> None:
    """Five connections are idle after one line, and many requests wait: the page says so first."""
    sleeping = [asyncio.create_task(served.ask("/sleepy")) for _ in range(5)]
    await becomes_true(lambda: checked_out(served.database) == 5)
    waiting = [asyncio.create_task(served.ask("/fast")) for _ in range(20)]
    await asyncio.sleep(0.6)
    facts = await served.facts()
    (database,) = facts["now"]
    assert (database["in_use"], database["most"], len(database["waiting"])) == (5, 5, 20)
    assert database["waiting"][0]["request"] == "GET /fast"
    assert database["waiting"][0]["seconds"] > 0.5
    assert [each["lane"] for each in database["connections"]] == [1, 2, 3, 4, 5]
    for each in database["connections"]:
        assert (each["state"], each["request"]) == ("idle", "GET /sleepy")
        assert each["line"].endswith(line_of(IDLE_LINE))
        assert not each["in_transaction"]  # only plain reads so far
    first = facts["findings"][0]
    assert first["line"].endswith(line_of(IDLE_LINE))
    assert re.match(r"keeps 5 connections idle now, .* while 20 requests wait", first["what"])
    page = (await served.ask("/db/")).body.decode()
    assert "<b>20 wait for a connection</b>" in page
    await asyncio.gather(*sleeping, *waiting)


async def test_it_shows_which_units_may_only_read(served: Served) -> None:
    """And which may write."""
    shown = {}
    for read_only in (True, False):
        async with served.database.begin(read_only=read_only) as session:
            await session.execute(ITEM.select())
            facts = await served.facts()
            lanes = [each for each in facts["now"][0]["connections"] if each["held"]]
            shown[read_only] = [each["read_only"] for each in lanes]
            page = (await served.ask("/db/")).body.decode()
            assert ("no transaction, read-only" in page) is read_only
    assert shown == {True: [True], False: [False]}


async def test_afterwards_it_still_does(served: Served) -> None:
    """The page shows the time between two lines, and the statement that was sent thirty times."""
    await served.ask("/sleepy")
    await served.ask("/many")
    facts = await served.facts()
    assert facts["now"][0]["in_use"] == 0
    idle, repeated = facts["recent"]["idle"][0], facts["recent"]["repeated"][0]
    assert idle["after"].endswith(line_of(IDLE_LINE))
    assert idle["before"] != idle["after"]
    assert 0.7 < idle["longest"] < 2
    assert repeated["line"].endswith(line_of(LOOP_LINE))
    assert (repeated["times"], repeated["units"]) == (30, 1)
    assert [each["kind"] for each in facts["findings"]] == ["idle", "repeated"]


async def test_routes_add_up(served: Served) -> None:
    """The page shows the count, the statements, the held time, and the reason of a rollback."""
    for _ in range(3):
        await served.ask("/fast")
    await served.ask("/refused")
    await served.ask(f"/secret/{SECRET}")
    routes = {each["route"]: each for each in (await served.facts())["recent"]["routes"]}
    fast, refusal = routes["GET /fast"], routes["GET /refused"]
    assert (fast["units"], fast["statements"], fast["rolled_back"]) == (3, 1, {})
    assert 0 < fast["held_p50"] <= fast["held_p95"]
    assert refusal["rolled_back"] == {"status": 1}
    assert routes["GET /secret/{token}"]["rolled_back"] == {
        "status": 1
    }  # the status 500, sent by Starlette


async def test_begin_is_shown_too(served: Served) -> None:
    """A `begin()` outside of a request is shown, without a middleware, for sync databases too."""
    async with served.database.begin() as session:
        await session.execute(select(ITEM))
        shown = (await served.facts())["now"][0]["connections"][0]
    assert (shown["request"], shown["state"]) == ("begin()", "idle")


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_it_says_if_a_connection_is_in_a_transaction(driver: str) -> None:
    """A plain read begins no transaction, and AUTOCOMMIT never does."""
    statements = (select(ITEM), text("SELECT 1"), ITEM.insert().values(note="x"))
    shown: dict[str, list[bool]] = {}
    url = postgres.new_database("live").set(drivername=f"postgresql+{driver}")
    for level in ("READ COMMITTED", "AUTOCOMMIT"):
        database = AsyncDatabase(url, isolation_level=level)
        page = LivePage(database)
        async with database:
            async with database.engine.begin() as connection:
                await connection.run_sync(ITEM.metadata.create_all)
            async with database.begin() as session:
                for statement in statements:
                    await session.execute(statement)
                    facts = json.loads((await asked(page, "/json").run()).body)
                    lane = facts["now"][0]["connections"][0]
                    shown.setdefault(level, []).append(lane["in_transaction"])
    assert shown == {"READ COMMITTED": [False, True, True], "AUTOCOMMIT": [False] * 3}


async def test_a_database_that_blocks_is_shown(tmp_path: Any) -> None:
    """The connections of a sync database are used in threads."""
    database = SyncDatabase(f"sqlite:///{tmp_path / 'live.db'}")
    page = LivePage(database)

    def work() -> None:
        with database.begin() as session:
            session.execute(text("SELECT 1"))

    async with database:
        await to_thread.run_sync(work)
        facts = json.loads((await asked(page, "/json").run()).body)
    assert [each["route"] for each in facts["recent"]["routes"]] == ["begin()"]


async def test_the_error_of_a_handler_is_raised_unchanged(tmp_path: Any) -> None:
    """The page asks if the error is a conflict, although its argument cannot be compared."""

    class Array:
        """Behaves like an array of NumPy."""

        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise ValueError("the truth value of an array is ambiguous")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await database.get_session().execute(text("SELECT 1"))
        raise LookupError(Array())

    database = AsyncDatabase(f"sqlite:///{tmp_path}/test.db")
    LivePage(database)
    async with database:
        exchange = await Exchange(DBSessionMiddleware(app, database)).run()
    assert type(exchange.error) is LookupError


async def test_a_wait_in_vain_is_counted() -> None:
    """The wait ends with the time-out, although the unit continues."""
    pytest.importorskip("prometheus_client")
    url = postgres.new_database("live").set(drivername="postgresql+asyncpg")
    database = AsyncDatabase(url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    page = LivePage(database)
    async with database, database.begin() as holder:
        await holder.execute(text("SELECT 1"))
        with pytest.raises(PoolTimeout):
            async with database.begin() as waiter:
                await waiter.execute(text("SELECT 1"))
        metrics = (await asked(page, "/metrics").run()).body.decode()
    assert re.search(r"^db_client_connection_timeouts_total\{.*\} 1.0$", metrics, re.MULTILINE)
    assert re.search(r'^db_client_connection_count\{.*"used"\} 1.0$', metrics, re.MULTILINE)


async def test_a_wait_in_vain_is_counted_once_if_an_operation_is_inside_another() -> None:
    """`get()` executes a SELECT, and both see the same error."""
    url = postgres.new_database("live").set(drivername="postgresql+asyncpg")
    database = AsyncDatabase(url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    page = LivePage(database)
    async with database, database.begin() as holder:
        await holder.execute(text("SELECT 1"))
        with pytest.raises(PoolTimeout):
            async with database.begin() as waiter:
                await waiter.get(Entry, 1)
    (totals,) = page._observer.current_totals()
    assert totals.timeouts == 1


async def test_two_pages_and_a_report_agree(served: Served) -> None:
    """Several observers measure each session once, and all get the same values."""
    other = LivePage(served.database)
    reports: list[Any] = []
    served.app = DBSessionMiddleware(served.app.app, served.database, on_report=reports.append)
    await served.ask("/many")
    (report,) = reports
    assert report.databases[0].statements == 31
    for page in (served.page, other):
        facts = json.loads((await asked(page, "/json").run()).body)
        assert facts["recent"]["routes"][0]["statements"] == 31


async def test_memory_is_bounded(served: Served) -> None:
    """A few hundred units are kept, with a few hundred statements each."""
    for _ in range(450):
        await served.ask("/fast")
    async with served.database.begin() as session:
        for _ in range(300):
            await session.execute(select(1))
            await session.commit()
    facts = await served.facts()
    assert facts["recent"]["units"] == 400
    assert not served.page._observer._open
    ended = served.page._observer.ended()
    assert max(len(list(tally.spans())) for unit in ended for _, tally in unit.tallies) <= 400
    async with served.database.begin() as session:
        for _ in range(300):
            await session.connection()  # for COPY by the driver, which is no statement
            await session.commit()
    stored = [steps for *_, steps in served.page._observer._ended]
    assert max(len(each) for steps in stored for each in steps.values()) <= 201
    assert (
        next(each for each in facts["recent"]["routes"] if each["route"] == "begin()")["statements"]
        == 300
    )


async def test_a_session_that_does_nothing_does_not_wait(served: Served) -> None:
    """The application may ask the session for its engine, outside of any operation."""
    async with served.database.begin() as session:
        session.get_bind()
        (database,) = (await served.facts())["now"]
    assert (database["waiting"], database["in_use"]) == ([], 0)


async def test_repeated_waits_in_vain_are_one_step() -> None:
    """They do not fill the memory, and all of them count."""
    url = postgres.new_database("live").set(drivername="postgresql+asyncpg")
    database = AsyncDatabase(url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    page = LivePage(database)
    async with database, database.begin() as holder:
        await holder.execute(text("SELECT 1"))
        async with database.begin() as waiter:
            for _ in range(4):
                with pytest.raises(PoolTimeout):
                    await waiter.execute(text("SELECT 1"))
    *_, steps = page._observer._ended[0]
    assert len(steps[database]) == 1
    ((_, tally),) = page._observer.ended()[0].tallies
    assert 0.2 <= tally.wait_time < 1


async def test_a_connection_that_another_task_holds_stays_on_the_page(
    served: Served, tmp_path: Path
) -> None:
    """One task of a WebSocket commits its work, while another task keeps its connection."""
    other = AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path / 'other.db'}")
    is_held, may_end = asyncio.Event(), asyncio.Event()
    shown: list[Any] = []

    async def hold() -> None:
        await served.database.get_session().execute(ITEM.insert().values(note="held"))
        is_held.set()
        await may_end.wait()
        await served.database.get_session().execute(select(ITEM))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        task = asyncio.create_task(hold())
        await is_held.wait()
        await other.get_session().execute(text("SELECT 1"))
        await send({"type": "websocket.accept"})
        facts = json.loads((await asked(served.page, "/json").run()).body)
        shown.extend(each["request"] for each in facts["now"][0]["connections"] if each["held"])
        may_end.set()
        await task
        await send({"type": "websocket.close"})

    async with other:
        socket = Socket(DBSessionMiddleware(app, served.database, other))
        await socket.run()
    assert socket.error is None
    assert shown == ["WebSocket (no route)"]
    first, second = served.page._observer.ended()
    assert [tally.statements for unit in (first, second) for _, tally in unit.tallies] == [1, 1]
    assert min(tally.use_time for unit in (first, second) for _, tally in unit.tallies) > 0
    assert (first.outcome, second.outcome) == ("nothing_to_do", "committed")


def kinds_of(stored: Any) -> set[type]:
    """Return the classes of all objects inside of nested lists, tuples and dictionaries."""
    if isinstance(stored, dict):
        stored = [*stored.keys(), *stored.values()]
    if not isinstance(stored, list | tuple):
        return {type(stored)}
    return {kind for each in stored for kind in kinds_of(each)}


async def test_it_keeps_no_request_alive(served: Served) -> None:
    """Only texts and numbers are stored, also of a request that failed."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await get_session().execute(select(ITEM).where(ITEM.c.note == SECRET))
        raise RuntimeError(SECRET)

    served.app = DBSessionMiddleware(app, served.database)
    await served.ask("/fails")
    stored = list(served.page._observer._ended)
    assert len(stored) == 1
    assert kinds_of(stored) <= {str, int, float, bool, type(None), AsyncDatabase}
    assert SECRET not in repr(stored)


async def test_without_a_page_nothing_is_watched() -> None:
    """A page keeps no units and no engines alive."""
    database = AsyncDatabase("sqlite+aiosqlite://")
    async with database:
        assert database.observers == ()
        # `do_terminate` is replaced for each asyncio engine: it closes lost connections.
        replaced = {name for name in vars(database.engine.dialect) if name.startswith("do_")}
        assert replaced <= {"do_terminate"}


# Who may see the page


@pytest.mark.parametrize(
    "changes",
    [
        {"client": ("10.0.0.1", 1)},
        {"client": ("127.0.0.1.evil.example", 1)},
        {"client": ("localhost", 1)},
        {"client": ("0.0.0.0", 1)},
        {"client": ("::ffff:10.0.0.1", 1)},
        {"client": ("", 0)},
        {"client": ()},
        {"client": None},
        {"host": b"shop.example"},
        {"host": b"127.0.0.1.evil.example"},
        {"host": b"localhost.evil.example:8000"},
        {"host": b"localhost:8000@evil.example"},
        {"host": b"evil.example\nlocalhost"},
        {"host": b""},
        {"headers": [(b"host", b"shop.example")]},
        {"headers": [(b"x-forwarded-for", b"127.0.0.1")]},
        {"headers": [(b"X-Forwarded-For", b"")]},
        {"headers": [(b"x-forwarded-host", b"localhost")]},
        {"headers": [(b"x-forwarded-proto", b"https")]},
        {"headers": [(b"forwarded", b"for=127.0.0.1")]},
        {"headers": [(b"x-real-ip", b"127.0.0.1")]},
        {"headers": [(b"via", b"1.1 proxy")]},
        {"headers": [(b"cf-connecting-ip", b"127.0.0.1")]},
        {"client": ("10.0.0.1", 1), "headers": [(b"x-forwarded-for", b"127.0.0.1")]},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/", "/json", "/metrics", "/events", "/x/json"])
async def test_nobody_from_outside_gets_in(path: str, changes: dict[str, Any]) -> None:
    """Other addresses and names and forged headers are refused, and get no information."""
    page = LivePage(AsyncDatabase("sqlite+aiosqlite:///private.db"))
    exchange = await asked(page, path, **changes).run()
    assert exchange.status == 403
    assert b"private" not in exchange.body


@pytest.mark.parametrize("client", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", [b"localhost", b"127.0.0.1:8000", b"[::1]:80", b"LocalHost"])
async def test_this_machine_gets_in(client: str, host: bytes) -> None:
    """Each address and name of this machine is accepted."""
    page = LivePage(AsyncDatabase("sqlite+aiosqlite:///private.db"))
    exchange = await asked(page, "/", client=(client, 1), host=host).run()
    assert exchange.status == 200


async def test_allow_decides_instead() -> None:
    """The function gets the scope; only the value True allows the page, so a coroutine does not."""
    database = AsyncDatabase("sqlite+aiosqlite://")
    far = {"client": ("10.0.0.1", 1), "headers": [(b"x-forwarded-for", b"10.0.0.2")]}

    async def hidden() -> bool:
        return False

    coroutine = hidden()
    rules: list[tuple[Any, int]] = [
        (lambda scope: scope["client"][0] == "10.0.0.1", 200),
        (lambda _: False, 403),
        (lambda _: 1, 403),
        (lambda _: coroutine, 403),
    ]
    for allow, status in rules:
        page = LivePage(database, allow=allow)
        assert (await asked(page, "/json", **far).run()).status == status
    coroutine.close()


async def test_an_allow_that_fails_shows_nothing() -> None:
    """An error of the function reaches the server."""

    def broken(_scope: Any) -> bool:
        raise LookupError

    page = LivePage(AsyncDatabase("sqlite+aiosqlite:///private.db"), allow=broken)
    exchange = await asked(page, "/json").run()
    assert isinstance(exchange.error, LookupError)
    assert exchange.messages == []


@pytest.mark.parametrize(
    ("databases", "options", "cure"),
    [
        ((), {}, "at least one database"),
        (("sqlite://",), {}, "AsyncDatabase or a SyncDatabase"),
        ((AsyncDatabase("sqlite://"),), {"allow": True}, "plain function"),
        ((AsyncDatabase("sqlite://"),), {"allow": fast}, "plain function"),
        ((AsyncDatabase("sqlite://"),), {"route": "/x"}, "plain function"),
        ((AsyncDatabase("sqlite://"),), {"allow": lambda: True}, r"Write `def allow\(scope\)`"),
        ((AsyncDatabase("sqlite://"),), {"route": lambda: ""}, r"Write `def route\(scope\)`"),
    ],
)
def test_what_it_cannot_be_made_with(databases: Any, options: Any, cure: str) -> None:
    """An `async def` function is refused at once, because its coroutine would count as true."""
    with pytest.raises(ConfigurationError, match=cure):
        LivePage(*databases, **options)


@pytest.mark.parametrize("path", ["/db/", "/db/json", "/db/metrics", "/nothing"])
async def test_every_answer_forbids_to_keep_or_frame_it(served: Served, path: str) -> None:
    """Refusals have these headers too; only the style and script of this answer may run."""
    for changes in ({}, {"client": ("10.0.0.1", 1)}, {"method": "POST"}):
        exchange = await asked(served.page, path, **changes).run()
        assert header(exchange, b"cache-control") == b"no-store"
        assert header(exchange, b"x-frame-options") == b"DENY"
        assert header(exchange, b"x-content-type-options") == b"nosniff"
        policy = header(exchange, b"content-security-policy")
        assert policy.startswith(b"default-src 'none'; ")
        assert b"unsafe" not in policy
        assert b"frame-ancestors 'none'" in policy
    page = await served.ask("/db/")
    again = await served.ask("/db/")
    nonces = [
        re.findall(rb"nonce-([^']+)'", header(e, b"content-security-policy")) for e in (page, again)
    ]
    assert len(set(nonces[0])) == 1
    assert nonces[0] != nonces[1]
    assert page.body.count(b'nonce="' + nonces[0][0]) == 2
    assert not re.search(rb"style=|onclick|https?://", page.body)


async def test_it_can_only_be_read(served: Served) -> None:
    """HEAD has no body; any other method is refused."""
    assert (await served.ask("/db/", method="HEAD")).body == b""
    assert (await served.ask("/db/events", method="HEAD")).body == b""
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        exchange = await served.ask("/db/", method=method)
        assert (exchange.status, header(exchange, b"allow")) == (405, b"GET, HEAD")


# What the page does not show


async def everything(served: Served) -> str:
    """Return everything that the page shows."""
    stream = asked(served.app, "/db/events")
    task = asyncio.create_task(stream.run())
    await becomes_true(lambda: b"data:" in stream.body)
    stream.hang_up.set()
    await task
    found = [(await served.ask(f"/db/{path}")).body for path in ("", "json", "metrics")]
    return b"".join([*found, stream.body]).decode()


async def test_no_value_gets_out(served: Served) -> None:
    """The secret is in paths, queries, headers, bodies, methods, parameters, SQL and errors."""
    headers = [(b"cookie", SECRET.encode()), (b"authorization", SECRET.encode())]
    for method in ("GET", SECRET.upper()):
        exchange = asked(served.app, f"/secret/{SECRET}", method=method, headers=headers)
        exchange.scope["query_string"] = SECRET.encode()
        await exchange.run()
    outside = await everything(served)
    async with served.database.begin() as session:
        await session.execute(select(ITEM).where(ITEM.c.note == SECRET))
        outside += await everything(served)
    assert "GET /secret/{token}" in outside
    assert "item.note = $" in outside
    assert SECRET not in outside
    assert SECRET.upper() not in outside


async def test_no_password_gets_out() -> None:
    """The name of a database has no user and no options."""
    url = f"postgresql+asyncpg://{SECRET}user:{SECRET}@db/shop?application_name={SECRET}"
    database = AsyncDatabase(url)
    page = LivePage(database)
    for path in ("/", "/json", "/metrics"):
        body = (await asked(page, path).run()).body.decode()
        assert "postgresql db/shop" in body
        assert SECRET not in body


@pytest.mark.parametrize("dialect", ["postgresql", "sqlite", "mysql", "oracle"])
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 'hunter2'",
        "SELECT 'it''s hunter2'",
        r"SELECT 'a\', 'hunter2'",
        r"SELECT 'a\'hunter2'",
        r"SELECT E'a\'hunter2'",
        "SELECT 'unfinished hunter2",
        "SELECT 'a' -- don't hunter2",
        "SELECT 1 -- hunter2",
        "SELECT /* hunter2 */ 1",
        "SELECT /* hunter2",
        "SELECT /* ' */ x, 'hunter2' /* ' */",
        "SELECT $$hunter2$$",
        "SELECT $x$hunter2$x$",
        "SELECT $x$ ' $x$, 'hunter2'",
        "SELECT 421337 + 42.1337 - 421337e3 * 0x421337",
        "SELECT N'hunter2', x'421337'",
        "SELECT 'a', $$b'hunter2$$, $$c$$",
        "SELECT 1 /* ' */, 'hunter2', 2 -- '",
    ],
)
def test_a_text_in_a_statement_is_replaced(statement: str, dialect: str) -> None:
    """Strings are hidden for all kinds of quotes and all settings of the database."""
    shown = without_values(statement, dialect)
    assert "hunter2" not in shown
    assert "1337" not in shown
    assert shown.startswith("SELECT")


@pytest.mark.parametrize("dialect", ["sqlite", "mysql"])
def test_texts_in_both_quotes_are_replaced(dialect: str) -> None:
    """A string in a comment and a comment in a string are both hidden."""
    for statement in (
        """SELECT 'a"', "hunter2", '"b'""",
        """SELECT "a'", 'hunter2', "'hunter2" """,
    ):
        assert "hunter2" not in without_values(statement, dialect)


@pytest.mark.parametrize("dialect", ["sqlite", "mysql"])
def test_double_quotes_hold_texts_there(dialect: str) -> None:
    """Words of SQL that SQLAlchemy quotes are shown."""
    shown = without_values('SELECT "hunter2" FROM "order" WHERE x = "a"', dialect)
    assert shown == 'SELECT "…" FROM "order" WHERE x = "…"'
    assert without_values('SELECT "Name"', "postgresql") == 'SELECT "Name"'


async def test_a_route_function_that_fails_fails_no_request(caplog: Any) -> None:
    """An error of the route function does not fail the shown request, and is logged."""

    def broken(_scope: Any) -> str:
        raise LookupError

    async with serving(route=broken) as served:
        assert (await served.ask("/fast")).status == 200
        facts = await served.facts()
    assert facts["recent"]["routes"][0]["route"] == "GET (route failed)"
    assert "is shown without a route" in caplog.messages[0]


async def test_everything_is_escaped() -> None:
    """Names of routes, files and databases are escaped."""
    evil = "<script>alert(1)</script>\"'&"
    database = AsyncDatabase(f"sqlite+aiosqlite:///file:{evil}?mode=memory&uri=true")
    page = LivePage(database, route=lambda _: evil)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        code = compile("work = lambda session: session.execute(statement)", f"/{evil}.py", "exec")
        names: dict[str, Any] = {"statement": text(f'SELECT 1 AS "{evil.replace(chr(34), "")}"')}
        exec(code, names)
        for _ in range(6):
            await names["work"](get_session())
        html.append((await asked(page, "/").run()).body.decode())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    html: list[str] = []
    async with database:
        await Exchange(DBSessionMiddleware(app, database)).run()
        html.append((await asked(page, "/").run()).body.decode())
    for each in html:
        assert "&lt;script&gt;alert" in each
        assert "<script>" not in each
        assert each.count("<script nonce=") == 1


# The guide

GUIDE = Page("docs/how-to/live-page.md")


async def test_the_guide_names_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page names the guide's handler, which calls a bank while it holds a connection."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'shop.db'}")
    (number,) = (
        n
        for n, each in enumerate(GUIDE.blocks()[0].splitlines(), 1)
        if each.endswith("of the bank")
    )
    app = GUIDE.run(0)["app"]
    life = await Life(app).startup()
    paying = asyncio.create_task(asked(app, "/pay").run())
    await asyncio.sleep(1)
    facts = json.loads((await asked(app, "/db/json").run()).body)
    await paying
    await life.shutdown()
    assert facts["findings"][0]["line"].endswith(f"live-page.md:{number - 1}")


async def test_the_guide_lets_in_by_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other client is allowed."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'shop.db'}")
    monkeypatch.setenv("LIVE_TOKEN", "42")
    page = GUIDE.run(1)["page"]
    for given, status in ((b"Bearer 42", 200), (b"Bearer 43", 403), (b"Bearer \xe4", 403)):
        far = {"client": ("10.0.0.1", 1), "headers": [(b"authorization", given)]}
        assert (await asked(page, "/", **far).run()).status == status
    assert (await asked(page, "/").run()).status == 403


async def test_the_guide_names_requests_and_needs_no_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example works as the guide says."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'shop.db'}")
    assert GUIDE.run(2)["route"]({"path": "/reset/42"}) == "/reset"
    app = GUIDE.run(3)["app"]
    life = await Life(app).startup()
    assert life.messages == [{"type": "lifespan.startup.complete"}]
    assert (await asked(app, "/db").run()).status == 200
    assert (await asked(app, "/db/json").run()).status == 200
    for other in ("/", "/dbs"):
        assert (await asked(app, other).run()).status == 204
    await life.shutdown()


# Responses of the page


async def test_it_moves_by_itself_and_holds_nothing(served: Served) -> None:
    """The server sends events until the client disconnects, and uses no connection of the pool."""
    stream = asked(served.app, "/db/events")
    task = asyncio.create_task(stream.run())
    await becomes_true(lambda: stream.body.count(b"data:") == 1)
    assert checked_out(served.database) == 0
    await served.ask("/fast")
    await becomes_true(lambda: stream.body.count(b"data:") == 2)
    assert header(stream, b"content-type") == b"text/event-stream"
    first, second = (
        json.loads(each) for each in re.findall(r"^data: (.*)$", stream.body.decode(), re.MULTILINE)
    )
    assert set(first["html"]) == {"findings", "now", "timeline", "recent"}
    assert "GET /fast" not in first["html"]["recent"]
    assert "GET /fast" in second["html"]["recent"]
    stream.hang_up.set()
    await asyncio.wait_for(task, 5)
    assert stream.error is None


async def test_a_stream_ends_so_that_servers_can_shut_down(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The browser reconnects at once."""
    monkeypatch.setattr("asgi_dbsession.live.page._STREAM", 0.1)
    stream = await served.ask("/db/events")
    assert stream.complete
    assert b"retry: 300\n" in stream.body


async def test_it_is_served_without_its_database() -> None:
    """The page works before the startup and after the shutdown."""
    page = LivePage(AsyncDatabase("sqlite+aiosqlite://"))
    assert "It is not running" in (await asked(page, "/").run()).body.decode()


def in_starlette(page: LivePage, database: AsyncDatabase) -> Any:
    app = Starlette(routes=[Route("/things/{thing}", fast)])
    app.mount("/db", page)
    return DBSessionMiddleware(app, database)


def in_fastapi(page: LivePage, database: AsyncDatabase) -> Any:
    app = FastAPI()
    app.add_api_route("/things/{thing}", things)
    app.mount("/db", page)
    app.add_middleware(DBSessionMiddleware, database)
    return app


def in_litestar(page: LivePage, database: AsyncDatabase) -> Any:
    @litestar_get("/things/{thing:str}")
    async def handler() -> str:
        return await things()

    mounted = asgi("/db", is_mount=True, copy_scope=True)(page.__call__)
    middleware: Any = DefineMiddleware(DBSessionMiddleware, database)
    return Litestar([handler, mounted], middleware=[middleware])


def in_quart(page: LivePage, database: AsyncDatabase) -> Any:
    app = Quart("things")
    app.route("/things/<thing>")(things)
    return in_front_of(page, DBSessionMiddleware(app, database))


def in_a_function(page: LivePage, database: AsyncDatabase) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await fast(Request(scope))
        await PlainTextResponse("ok")(scope, receive, send)

    return in_front_of(page, DBSessionMiddleware(app, database))


async def things(thing: str = "") -> str:
    await get_session().execute(select(ITEM))
    return "ok"


def in_front_of(page: LivePage, app: Any) -> Any:
    """A framework without mounts can serve the page like this."""

    async def dispatch(scope: Any, receive: Any, send: Any) -> None:
        is_page = scope["type"] == "http" and scope["path"].startswith("/db")
        await (page if is_page else app)(scope, receive, send)

    return dispatch


@pytest.mark.parametrize(
    ("mount", "route"),
    [
        (in_starlette, "GET /things/{thing}"),
        (in_fastapi, "GET /things/{thing}"),
        (in_litestar, "GET /things/{thing"),
        (in_quart, "GET /things/<thing>"),
        (in_a_function, "GET (no route)"),
    ],
)
async def test_it_works_in_every_framework(mount: Any, route: str, tmp_path: Any) -> None:
    """The page works with and without a final slash, and its links and route names are right."""
    database = AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path / 'live.db'}")
    app = mount(LivePage(database), database)
    life = await Life(app).startup()
    async with database:
        async with database.engine.begin() as connection:
            await connection.run_sync(ITEM.metadata.create_all)
        assert (await asked(app, f"/things/{SECRET}").run()).status == 200
        for path in ("/db", "/db/"):
            page = await asked(app, path).run()
            if page.status == 307:  # Starlette adds the slash
                continue
            assert page.status == 200
            for link in re.findall(r'<a href="([^"]+)"', page.body.decode()):
                target, _, query = urljoin(path, link).partition("?")
                linked = await asked(app, target, query_string=query.encode()).run()
                assert linked.status == 200
                assert b"<html" not in linked.body
        facts = json.loads((await asked(app, "/db/json").run()).body)
        await life.shutdown()
    assert [each["route"][: len(route)] for each in facts["recent"]["routes"]] == [route]
    assert SECRET not in json.dumps(facts)


def test_the_core_does_not_import_the_page() -> None:
    """An application without a page does not import its code; reports do not import it either."""
    code = (
        "import sys, asgi_dbsession, asgi_dbsession.reports.recorder\n"
        "print([each for each in sys.modules if each.startswith('asgi_dbsession.live')])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "[]"
