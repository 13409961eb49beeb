"""Replicas with everything else: pools, faults, sockets, several databases, workers, tests."""

import asyncio
from contextlib import AsyncExitStack
from contextvars import Context
from typing import Any

import pytest
from asgi import Socket, respond
from conftest import CHILD, ENTRY, becomes_true
from replicas import Cluster
from replicated_shop import COUNT, TWO_KINDS, Client, Shop, ports, reads_from, set_cookies
from sqlalchemy import event, select
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DBSessionMiddleware,
    Replicas,
    SyncDatabase,
    on_commit,
    safe_methods,
)
from asgi_dbsession.live import LivePage
from asgi_dbsession.replicas.position import Position, Seen
from asgi_dbsession.testing import rolled_back

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_a_replica_that_is_down_keeps_nothing_from_starting(
    nodes: Cluster, kind: str
) -> None:
    """It is read from when it comes up."""
    down, up = nodes.replicas
    down.kill()
    shop = Shop(nodes, kind)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), {up.port})
        health = await shop.database.health()
        assert health.answers
        assert [each.answers for each in health.replicas] == [False, True]
        down.start()
        await reads_from(lambda: Client(shop.app), ports(nodes))
        assert all(each.answers for each in (await shop.database.health()).replicas)
        up.kill()
        await asyncio.sleep(0.5)
        await reads_from(lambda: Client(shop.app), {down.port})
        down.kill()
        await asyncio.sleep(0.5)
        await reads_from(lambda: Client(shop.app), {nodes.primary.port})


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_a_replica_that_lags_too_far_is_left_out(nodes: Cluster, kind: str) -> None:
    """It comes back by itself."""
    shop = Shop(nodes, kind)
    shop = Shop(nodes, kind, replicas=Replicas(shop.urls[1:], max_lag=1))
    slow, quick = nodes.replicas
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        slow.pause()

        async def goes_on() -> None:
            while True:
                await Client(shop.app).write()
                await asyncio.sleep(0.1)

        writing = asyncio.create_task(goes_on())
        await asyncio.sleep(1.5)
        await reads_from(lambda: Client(shop.app), {quick.port})
        slow.resume()
        await reads_from(lambda: Client(shop.app), ports(nodes))
        writing.cancel()
        await asyncio.wait([writing])


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_a_replica_that_crashed_takes_no_client_back(nodes: Cluster, kind: str) -> None:
    """It accepts readers before it has replayed again what its clients have seen."""
    shop, replica = Shop(nodes, kind, pool_pre_ping=True), nodes.replicas[0]
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        replica.ask("CHECKPOINT")
        client = Client(shop.app)
        while (await client.read())[1] != replica.port:
            client = Client(shop.app)
        await Client(shop.app).write()
        nodes.catch_up()
        assert (await client.read()) == (1, replica.port)
        nodes.lag(60_000, replica)
        replica.kill()
        replica.start()
        assert replica.at("replicas").ask("SELECT count(*) FROM entry") == 0
        await reads_from(lambda: Client(shop.app), ports(nodes))
        assert (await client.read())[0] == 1


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_a_read_after_begin_sees_what_begin_has_written(nodes: Cluster, kind: str) -> None:
    """Also in the session that has read from a replica before."""
    counts: list[int] = []

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        database: Any = shop.database
        for _ in range(2):
            counts.append(await shop.count())
            if isinstance(database, SyncDatabase):
                with database.begin():
                    await shop.write()
            else:
                async with database.begin():
                    await shop.write()
        counts.append(await shop.count())
        await respond(send)

    shop = Shop(nodes, kind)
    app = DBSessionMiddleware(handle, shop.database, read_only=safe_methods)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        nodes.lag(10_000)
        await Client(app).ask("GET")
    assert counts == [0, 1, 2]


async def test_a_repeatable_read_reads_the_same_again(nodes: Cluster) -> None:
    """As it does without replicas."""
    counts: list[int] = []

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        database: Any = shop.database
        counts.append(await shop.count())
        async with database.begin():
            await shop.write()
        counts.append(await shop.count())
        await respond(send)

    shop = Shop(nodes, isolation_level="REPEATABLE READ")
    app = DBSessionMiddleware(handle, shop.database, read_only=safe_methods)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        await Client(app).ask("GET")
    assert counts == [0, 0]


async def test_a_response_inside_of_begin_tells_of_its_commit(nodes: Cluster) -> None:
    """The application commits, and the block of `begin()` is still open when it responds."""

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        database: Any = shop.database
        async with database.begin() as session:
            await shop.write()
            await session.commit()
            await respond(send)

    shop = Shop(nodes)
    app = DBSessionMiddleware(handle, shop.database, read_only=safe_methods)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        nodes.lag(10_000)
        client = Client(app)
        await client.ask("POST")
        assert await Client(shop.app, client.cookies).read() == (1, nodes.primary.port)


async def test_a_text_that_is_no_position_is_not_sent_on(nodes: Cluster) -> None:
    """It may come from another client, in a message."""

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        database: Any = shop.database
        async with database.begin(read_only=True, after="1; Domain=example.com"):
            pass
        await respond(send)

    shop = Shop(nodes)
    app = DBSessionMiddleware(handle, shop.database, read_only=safe_methods)
    async with shop.database:
        client = Client(app)
        (cookie,) = set_cookies(await client.ask("GET"))
        assert "example" not in cookie
        assert (await Client(shop.app, client.cookies).read())[1] == nodes.primary.port


def test_a_later_position_is_the_greater_text() -> None:
    """Even if the primary did not answer in between, so that a store keeps the right one."""
    seen = Seen()
    seen.read_from_primary(Position(1, 10, "0" * 8))
    first = seen.news()
    seen.read_from_primary(None)
    unclear = seen.news()
    seen.read_from_primary(Position(1, 11, "0" * 8))
    last = seen.news()
    assert first is not None
    assert unclear is not None
    assert last is not None
    assert first < unclear < last
    assert not Seen(unclear).is_trusted


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_the_least_busy_replica_is_chosen(nodes: Cluster, kind: str) -> None:
    """A replica whose connections are in use gets no new clients."""
    shop = Shop(nodes, kind)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        engine: Any = shop.database.replicas[0].engine
        async with AsyncExitStack() as stack:
            if isinstance(shop.database, SyncDatabase):
                stack.enter_context(engine.connect())
            else:
                await stack.enter_async_context(engine.connect())
            for _ in range(5):
                assert (await Client(shop.app).read())[1] == nodes.replicas[1].port


async def test_positions_are_asked_for_once_for_all(nodes: Cluster) -> None:
    """Requests that wait for a position share the questions; a cancelled one takes none with it."""
    shop = Shop(nodes)
    asked: list[float] = []
    nodes.lag(500)
    async with shop.database:
        client = Client(shop.app)
        await client.read()
        await client.write()
        for server in shop.database._replica_set.replicas:
            event.listen(
                server.asker.engine.sync_engine,
                "before_cursor_execute",
                lambda *_: asked.append(asyncio.get_running_loop().time()),
            )
        start = asyncio.get_running_loop().time()
        reads = [asyncio.create_task(Client(shop.app, client.cookies).read()) for _ in range(100)]
        await asyncio.sleep(0)
        for each in reads[::2]:
            each.cancel()
        await asyncio.wait(reads)
        passed = asyncio.get_running_loop().time() - start
        assert {each.result() for each in reads[1::2]} == {(1, nodes.primary.port)}
        assert 0 < len(asked) <= 2 * (2 + passed / 0.005)
        await reads_from(lambda: Client(shop.app, dict(client.cookies)), ports(nodes))


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_what_follows_a_write_sees_it(nodes: Cluster, kind: str) -> None:
    """Functions given to on_commit, streaming bodies, background tasks, child tasks."""
    seen: list[tuple[str, int]] = []

    async def look(where: str) -> None:
        database: Any = shop.database
        if isinstance(database, SyncDatabase):

            def count() -> int:
                with database.begin(read_only=True) as session:
                    return int(session.scalar(COUNT) or 0)

            seen.append((where, await asyncio.to_thread(count)))
        else:
            async with database.begin(read_only=True) as session:
                seen.append((where, await session.scalar(COUNT)))

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        await shop.write()
        on_commit(lambda: look("on_commit"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await look("body")
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        await asyncio.create_task(look("child"))
        await send({"type": "http.response.body"})
        await look("background")

    shop = Shop(nodes, kind, handle)
    nodes.lag(1000)
    async with shop.database:
        await Client(shop.app).ask("POST")
    assert seen == [("on_commit", 1), ("body", 1), ("child", 1), ("background", 1)]


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_the_application_may_commit_by_itself(nodes: Cluster, kind: str) -> None:
    """Its position is told all the same, and what follows sees it."""

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "GET":
            return await shop.answer(scope, receive, send)
        await shop.write()
        database: Any = shop.database
        if isinstance(database, SyncDatabase):
            await asyncio.to_thread(database.get_session().commit)
            with database.begin(read_only=True) as session:
                count = session.scalar(COUNT)
        else:
            await database.get_session().commit()
            async with database.begin(read_only=True) as session:
                count = await session.scalar(COUNT)
        return await respond(send, body=str(count).encode())

    shop = Shop(nodes, kind, handle)
    async with shop.database:
        await reads_from(lambda: Client(shop.app), ports(nodes))
        nodes.lag(1000)
        exchange = await Client(shop.app).ask("POST")
        assert exchange.body == b"1"
        assert len(set_cookies(exchange)) == 1


@pytest.mark.parametrize("attempts", [1, 3])
@pytest.mark.parametrize(("path", "status"), [("/commit", 409), ("/pool", 503), ("/inner", 409)])
async def test_a_response_of_the_middleware_tells_of_a_commit(
    nodes: Cluster, path: str, status: int, attempts: int
) -> None:
    """The next read sees what a `begin()` block committed, although the request itself failed."""

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "GET":
            await shop.answer(scope, receive, send)
            return
        database: Any = shop.database
        async with database.begin() as session:
            await session.execute(ENTRY.insert().values(note="stored"))
        if path == "/pool":
            raise PoolTimeout
        child = CHILD.insert().values(entry_id=-1)
        await database.get_session().execute(child)
        await respond(send)

    async def conflict(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, 409)

    shop = Shop(nodes)
    app = DBSessionMiddleware(
        handle,
        shop.database,
        read_only=safe_methods,
        on_commit_error=lambda _: conflict,
        retry_after=1 if path == "/pool" else None,
        attempts=attempts,
    )
    if path == "/inner":
        app = DBSessionMiddleware(app, AsyncDatabase("sqlite+aiosqlite://"), attempts=attempts)
    async with shop.database:
        await reads_from(lambda: Client(app), ports(nodes))
        nodes.lag(1000)
        client = Client(app)
        exchange = await client.ask("POST", path)
        assert exchange.status == status
        assert len(set_cookies(exchange)) == 1
        assert (await client.read())[0] == 1


async def test_a_socket_sees_what_it_wrote(nodes: Cluster) -> None:
    """Message by message; and the cookie of the handshake counts."""
    heard: list[int] = []

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        database: Any = shop.database
        await receive()
        async with database.begin(read_only=True) as session:
            heard.append(await session.scalar(COUNT))
        await send({"type": "websocket.accept"})
        while (await receive())["type"] == "websocket.receive":
            await shop.write()
            await send({"type": "websocket.send", "text": "written"})
            async with database.begin(read_only=True) as session:
                heard.append(await session.scalar(COUNT))

    shop = Shop(nodes, handle=handle)
    writer = Shop(nodes)
    nodes.lag(1000)
    async with writer.database, shop.database:
        client = Client(writer.app)
        await client.write()
        socket = Socket(shop.app)
        socket.scope["headers"].append(
            (b"cookie", f"db_position={client.cookies['db_position']}".encode())
        )
        for _ in range(3):
            socket.say("write")
        socket.hang_up(1000)
        await socket.run()
        assert socket.error is None
        assert heard == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_a_worker_reads_after_the_position_in_a_message(nodes: Cluster, kind: str) -> None:
    """In another process, without a cookie: the message carries it."""

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        await shop.write()
        on_commit(lambda: messages.append(shop.database.position))
        await respond(send)

    def count_after(database: Any, position: str | None) -> Any:
        if isinstance(database, SyncDatabase):
            with database.begin(read_only=True, after=position) as session:
                return session.scalar(COUNT), session.get_bind().url.port
        return count_later(database, position)

    async def count_later(database: Any, position: str | None) -> Any:
        async with database.begin(read_only=True, after=position) as session:
            return await session.scalar(COUNT), session.get_bind().url.port

    async def in_context(database: Any, position: str | None) -> Any:
        if isinstance(database, SyncDatabase):
            return await asyncio.to_thread(Context().run, count_after, database, position)
        task = asyncio.get_running_loop().create_task(
            count_after(database, position), context=Context()
        )
        return await task

    messages: list[str | None] = []
    shop, worker = Shop(nodes, kind, handle), Shop(nodes, kind).database
    async with shop.database, worker:
        await in_context(worker, None)
        nodes.lag(1000)
        await Client(shop.app).ask("POST")
        (position,) = messages
        assert position is not None
        assert (await in_context(worker, None))[0] == 0
        assert await in_context(worker, position) == (1, nodes.primary.port)
        assert await in_context(worker, "nonsense") == (1, nodes.primary.port)
        nodes.catch_up()
        count, port = await in_context(worker, position)
        assert (count, port in ports(nodes)) == (1, True)


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_a_worker_reads_what_it_has_written_itself(nodes: Cluster, kind: str) -> None:
    """Unit after unit, without any request."""
    shop = Shop(nodes, kind)
    nodes.lag(500)
    async with shop.database:
        database: Any = shop.database
        for number in range(1, 4):
            if isinstance(database, SyncDatabase):
                with database.begin() as session:
                    session.execute(ENTRY.insert().values(note=str(number)))
                with database.begin(read_only=True) as session:
                    assert session.scalar(COUNT) == number
            else:
                async with database.begin() as session:
                    await session.execute(ENTRY.insert().values(note=str(number)))
                async with database.begin(read_only=True) as session:
                    assert await session.scalar(COUNT) == number


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_within_rolled_back_all_reads_see_what_the_test_wrote(
    nodes: Cluster, kind: str
) -> None:
    """On the one connection of the test, for no replica can see it."""
    shop = Shop(nodes, kind)
    async with rolled_back(shop.database):
        client = Client(shop.app)
        await client.write()
        assert await client.read() == (1, nodes.primary.port)
    async with shop.database:
        assert (await Client(shop.app).read())[0] == 0


async def test_several_databases_have_a_cookie_each(nodes: Cluster) -> None:
    """Also in nested middleware, and beside a database without replicas."""
    inner, outer = Shop(nodes), Shop(nodes)
    outer = Shop(nodes, replicas=Replicas(outer.urls[1:], cookie="other"))
    plain = AsyncDatabase("sqlite+aiosqlite://")

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            for each in (inner, outer):
                await each.write()
        counts = [await each.count() for each in (inner, outer)]
        await respond(send, body=repr(counts).encode())

    nested = DBSessionMiddleware(
        DBSessionMiddleware(handle, inner.database, outer.database, read_only=safe_methods),
        *(outer.database, plain),
        read_only=safe_methods,
    )
    flat = DBSessionMiddleware(handle, inner.database, outer.database, read_only=safe_methods)
    nodes.lag(1000)
    async with inner.database, outer.database, plain:
        for number, app in enumerate((nested, flat), 1):
            client = Client(app)
            exchange = await client.ask("POST")
            names = [each.partition("=")[0] for each in set_cookies(exchange)]
            assert sorted(names) == ["db_position", "other"]
            for _ in range(3):
                assert (await client.ask("GET")).body == repr([2 * number] * 2).encode()


async def test_the_live_page_shows_a_table_for_each_server(nodes: Cluster) -> None:
    """Whoever reads from a replica is shown there."""
    shown: dict[str, int] = {}

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        await shop.execute(select(1))
        for each in page._now.look():
            port = each["name"].rpartition("/")[0].rpartition(":")[2]
            shown[port] = sum(lane["state"] in ("idle", "working") for lane in each["connections"])
        await respond(send, body=str(shop.port).encode())

    shop = Shop(nodes, handle=handle)
    page = LivePage(shop.database)
    async with shop.database:
        port = (await Client(shop.app).ask("GET")).body.decode()
    assert len(shown) == 3
    assert {name: count for name, count in shown.items() if count} == {port: 1}


@pytest.mark.parametrize("kind", TWO_KINDS)
async def test_shutdown_leaves_no_connection(nodes: Cluster, kind: str) -> None:
    """Neither of the pools, nor of what asks for positions."""
    query = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = 'replicas' AND pid <> pg_backend_pid()"
    )
    shop = Shop(nodes, kind)
    for _ in range(2):
        async with shop.database, shop.database:
            await reads_from(lambda: Client(shop.app), ports(nodes))
            await Client(shop.app).write()
        for each in (nodes.primary, *nodes.replicas):
            await becomes_true(lambda each=each: each.ask(query) == 0)  # type: ignore[misc]


def test_a_plain_block_starts_and_ends_replicas_too(nodes: Cluster) -> None:
    """In a script without an event loop."""
    shop = Shop(nodes, "psycopg-sync")
    database: Any = shop.database
    for _ in range(2):
        with database, database.begin(read_only=True) as session:
            assert session.scalar(COUNT) == 0
            assert session.get_bind().url.port in ports(nodes)
        assert not any(each.is_running for each in database.replicas)


URL = "postgresql+psycopg://app@localhost/shop"
OTHER = "postgresql+psycopg://app@replica/shop"
BOUND = create_async_engine(URL)


@pytest.mark.parametrize(
    ("url", "options", "cure"),
    [
        ("sqlite+aiosqlite:///shop.db", {"replicas": ["sqlite:///b.db"]}, "for PostgreSQL only"),
        (URL, {"replicas": OTHER}, r"replicas=\[url\]"),
        (URL, {"replicas": [URL]}, "not\\s+that of the primary"),
        (URL, {"replicas": [OTHER, OTHER]}, "each replica once"),
        (URL, {"replicas": ["postgresql+asyncpg://app@replica/shop"]}, "Leave the driver out"),
        (URL, {"replicas": ["nonsense"]}, "not a database URL"),
        (URL, {"replicas": [OTHER], "session_options": {"binds": {Session: BOUND}}}, "binds"),
        (URL, {"replicas": [OTHER], "isolation_level": "SERIALIZABLE"}, "REPEATABLE READ"),
    ],
)
def test_options_that_cannot_work_are_refused(url: str, options: Any, cure: str) -> None:
    """At once, and with what to write."""
    with pytest.raises(ConfigurationError, match=cure):
        AsyncDatabase(url, **options)


class Store:
    """A store that keeps nothing."""

    async def load(self, scope: Any) -> str | None: ...

    async def save(self, scope: Any, position: str) -> None: ...


class ForOneClient:
    """A store that does not get the scope, which tells clients apart."""

    async def load(self) -> str | None: ...

    async def save(self, position: str) -> None: ...


class StaticStore:
    """A class that is a store itself."""

    @staticmethod
    async def load(scope: Any) -> str | None: ...

    @classmethod
    async def save(cls, scope: Any, position: str) -> None: ...


@pytest.mark.parametrize("store", [Store(), StaticStore, None])
def test_a_store_is_known_by_its_methods(store: Any) -> None:
    """It needs no base class."""
    assert Replicas([OTHER], store=store).store is store


async def test_a_position_is_a_text() -> None:
    """The error is the same with and without replicas."""
    wrong: Any = 3
    for database in (AsyncDatabase(URL), AsyncDatabase(URL, replicas=[OTHER])):
        with pytest.raises(ConfigurationError, match="a value of the property `position`, not"):
            async with database.begin(read_only=True, after=wrong):
                pass


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"max_lag": 0}, "1 or more"),
        ({"max_lag": True}, "1 or more"),
        ({"cookie": "a b"}, "name of a cookie"),
        ({"path": "shop"}, "such as `/`"),
        ({"max_lag": float("inf")}, "a finite number"),
        ({"store": 3}, r"`async def load\(scope\)` and `async def save\(scope, position\)`, not"),
        ({"store": "redis://localhost"}, "not something of type str"),
        ({"store": {}}, "not something of type dict"),
        ({"store": Store}, "and not a class"),
        ({"store": ForOneClient()}, "not something of type ForOneClient"),
    ],
)
def test_options_of_replicas_are_checked(options: Any, cure: str) -> None:
    """So are those that say how positions travel."""
    with pytest.raises(ConfigurationError, match=cure):
        Replicas([OTHER], **options)


async def test_positions_make_sense_for_reads_alone() -> None:
    """So does a cookie that two databases would share."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)

    one = AsyncDatabase(URL, replicas=[OTHER])
    with pytest.raises(ConfigurationError, match="read_only=True, after=position"):
        async with one.begin(after="…"):
            pass
    another = AsyncDatabase(URL, replicas=[OTHER])
    wrapped: Any = DBSessionMiddleware(app, one, another)
    with pytest.raises(ConfigurationError, match="cookie="):
        await wrapped._startable[0].startup()


async def test_without_replicas_the_same_code_runs(nodes: Cluster) -> None:
    """On a developer's machine, say."""
    shop = Shop(nodes, replicas=())
    database: Any = shop.database
    async with database:
        async with database.begin(read_only=True, after="whatever") as session:
            assert await session.scalar(COUNT) == 0
        assert database.position is None
        assert database.replicas == ()
        assert (await database.health()).replicas == ()
