"""Strawberry: each operation is a unit of work, over HTTP and over both WebSocket protocols."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import strawberry
from conftest import becomes_true, checked_out
from library import STORES, Library, library, served
from pages import Page
from sqlalchemy import text
from strawberry.asgi import GraphQL
from strawberry.extensions import SchemaExtension
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosedError
from websockets.typing import Subprotocol

from asgi_dbsession import ConcurrentUse, DBSessionMiddleware, get_session

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/strawberry.md")
LINES = "SELECT text FROM line"
# The two protocols: how an operation begins, how its results come, and how it is stopped.
PROTOCOLS = {
    "graphql-transport-ws": ("subscribe", "next", "complete"),
    "graphql-ws": ("start", "data", "stop"),
}


class Peer:
    """A client of one socket."""

    def __init__(self, socket: ClientConnection, protocol: str) -> None:
        self._socket = socket
        self._begin, self._result, self._stop = PROTOCOLS[protocol]

    async def say(self, kind: str, **message: Any) -> None:
        await self._socket.send(json.dumps({"type": kind, **message}))

    async def hear(self) -> Any:
        return json.loads(await asyncio.wait_for(self._socket.recv(), 10))

    async def begin(self, name: str, query: str) -> None:
        """Begin an operation."""
        await self.say(self._begin, id=name, payload={"query": query})

    async def stop(self, name: str) -> None:
        """Stop an operation."""
        await self.say(self._stop, id=name)

    async def result(self) -> tuple[str, Any]:
        """The next result of any operation: its name, and what it is."""
        message = await self.hear()
        while message["type"] == "complete":
            message = await self.hear()
        assert message["type"] == self._result, message
        return message["id"], message["payload"]


@pytest.fixture(params=STORES)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Library]:
    """The files of the page."""
    with library(PAGE, request.param, tmp_path) as found:
        yield found


@asynccontextmanager
async def connected(host: str, protocol: str = "graphql-transport-ws") -> AsyncIterator[Peer]:
    """A socket whose server is ready for operations."""
    async with connect(f"ws://{host}/", subprotocols=[Subprotocol(protocol)]) as socket:
        peer = Peer(socket, protocol)
        await peer.say("connection_init")
        assert (await peer.hear())["type"] == "connection_ack"
        yield peer


async def test_over_http_each_operation_is_stored_or_not(page: Library) -> None:
    """The work of a mutation without errors is stored; after an error nothing is stored."""
    module = page.load("lines")

    async def ask(query: str) -> Any:
        return (await client.post(f"http://{host}/", json={"query": query})).json()

    async with served(module.app, module.database) as host, httpx2.AsyncClient() as client:
        answer = await ask('mutation { add(text: "one") }')
        assert answer["data"] == {"add": 1}
        assert page.stored(LINES) == ["one"]
        assert (await ask('mutation { add(text: "") }'))["errors"]
        assert (await ask('mutation { two: add(text: "two") one: add(text: "one") }'))["errors"]
        assert page.stored(LINES) == ["one"]
        assert (await ask("{ count }"))["data"] == {"count": 1}
        assert (await ask("{ one: count two: count }"))["data"] == {"one": 1, "two": 1}


async def test_over_a_socket_a_result_is_sent_after_commit(page: Library) -> None:
    """Each mutation is stored before its result arrives, also among parallel operations."""
    module = page.load("lines")
    texts = [f"line {number}" for number in range(20)]
    async with served(module.app, module.database) as host, connected(host) as peer:
        for each in texts:
            await peer.begin(each, f'mutation {{ add(text: "{each}") }}')
            await peer.begin(f"count {each}", "{ count }")
        heard: set[str] = set()
        while len(heard) < 2 * len(texts):
            name, payload = await peer.result()
            assert "errors" not in payload
            assert name.startswith("count") or name in page.stored(LINES)
            heard.add(name)
    assert page.stored(LINES) == sorted(texts)


async def test_over_a_socket_a_failed_mutation_takes_no_other_with_it(page: Library) -> None:
    """Of three parallel operations, only the one with an error is rolled back."""
    module = page.load("lines")
    async with served(module.app, module.database) as host, connected(host) as peer:
        for name, line in (("1", "one"), ("2", ""), ("3", "three")):
            await peer.begin(name, f'mutation {{ add(text: "{line}") }}')
        results = dict([await peer.result() for _ in range(3)])
    assert [bool(results[each].get("errors")) for each in "123"] == [False, True, False]
    assert page.stored(LINES) == ["one", "three"]


@pytest.mark.parametrize("transport", ["http", "websocket"])
async def test_a_commit_that_fails_is_an_error_of_the_operation(
    page: Library, transport: str
) -> None:
    """The client gets no data, and the next operation is served."""
    if page.reader.dialect.name == "sqlite":
        pytest.skip("what only COMMIT refuses is PostgreSQL's here")
    module = page.load("lines")
    page.execute("ALTER TABLE line DROP CONSTRAINT line_text_key")
    page.execute("ALTER TABLE line ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED")
    page.execute("INSERT INTO line (text) VALUES ('one')")
    mutation = 'mutation { add(text: "one") }'
    async with served(module.app, module.database) as host:
        if transport == "http":
            async with httpx2.AsyncClient() as client:
                response = await client.post(f"http://{host}/", json={"query": mutation})
            answer = response.json()
        else:
            async with connected(host) as peer:
                await peer.begin("1", mutation)
                answer = await peer.hear()
                assert answer["type"] == "error"
                await peer.begin("2", "{ count }")
                assert await peer.result() == ("2", {"data": {"count": 1}})
    assert "unique" in json.dumps(answer)
    assert not answer.get("data")
    assert page.stored(LINES) == ["one"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_subscriptions_share_a_socket(page: Library, protocol: str) -> None:
    """Several subscriptions on one socket get each line, and hold no connection meanwhile."""
    module = page.load("lines")
    names = [str(number) for number in range(3)]
    async with served(module.app, module.database) as host, connected(host, protocol) as peer:
        for name in names:
            await peer.begin(name, "subscription { lines }")
        for line in ("one", "two"):
            page.execute(f"INSERT INTO line (text) VALUES ('{line}')")
            heard = [await peer.result() for _ in names]
            assert sorted(heard) == [(name, {"data": {"lines": line}}) for name in names]
            await becomes_true(lambda: checked_out(module.database) == 0)
        await peer.stop("0")
        if protocol == "graphql-transport-ws":
            await peer.begin("add", 'mutation { add(text: "three") }')
            results = dict([await peer.result() for _ in range(3)])
            assert sorted(results) == ["1", "2", "add"]
            assert "three" in page.stored(LINES)


async def test_an_operation_that_the_client_stops_is_rolled_back(page: Library) -> None:
    """The connection of the operation is back in the pool."""
    module = page.load("lines")
    begun = asyncio.Event()

    @strawberry.type
    class Slow:
        @strawberry.mutation
        async def add_slowly(self) -> int:
            get_session().add(module.Line(text="slow"))
            await get_session().flush()
            begun.set()
            await asyncio.sleep(60)
            return 1

    schema = strawberry.Schema(module.Query, Slow, extensions=[module.UnitPerOperation])
    app = DBSessionMiddleware(GraphQL(schema), module.database)
    async with served(app, module.database) as host, connected(host) as peer:
        await peer.begin("1", "mutation { addSlowly }")
        await begun.wait()
        assert checked_out(module.database) == 1
        await peer.stop("1")
        await becomes_true(lambda: checked_out(module.database) == 0)
        await peer.begin("2", "{ count }")
        assert await peer.result() == ("2", {"data": {"count": 0}})


async def test_on_operation_would_send_before_commit(page: Library) -> None:
    """The page uses `on_execute`, because the other hook is still open when the result arrives."""
    module = page.load("lines")
    received, arrived = asyncio.Event(), asyncio.Event()

    class TooWide(SchemaExtension):
        async def on_operation(self) -> AsyncIterator[None]:
            async with module.database.begin():
                yield
                received.set()
                await arrived.wait()

    schema = strawberry.Schema(module.Query, module.Mutation, extensions=[TooWide])
    app = DBSessionMiddleware(GraphQL(schema), module.database)
    async with served(app, module.database) as host, connected(host) as peer:
        await peer.begin("1", 'mutation { add(text: "one") }')
        assert await peer.result() == ("1", {"data": {"add": 1}})
        await received.wait()
        assert page.stored(LINES) == []
        arrived.set()
        assert (await peer.hear())["type"] == "complete"
    assert page.stored(LINES) == ["one"]


async def test_without_the_extension_operations_at_once_are_refused(page: Library) -> None:
    """Work that is not stored is not announced, and the socket is closed at once."""
    module = page.load("lines")
    errors: list[BaseException] = []
    inserted = asyncio.Semaphore(0)

    @strawberry.type
    class Add:
        @strawberry.mutation
        async def add(self, line: str, seconds: float) -> int:
            session = get_session()
            await session.execute(text("INSERT INTO line (text) VALUES (:line)"), {"line": line})
            inserted.release()
            await asyncio.sleep(seconds)
            return 1

    graphql = GraphQL[None, None](strawberry.Schema(module.Query, Add))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def send_and_note(message: Any) -> None:
            try:
                await send(message)
            except BaseException as error:
                errors.append(error)
                raise

        await graphql(scope, receive, send_and_note)

    guarded = DBSessionMiddleware(app, module.database)
    async with served(guarded, module.database) as host, connected(host) as peer:
        await peer.begin("1", 'mutation { add(line: "one", seconds: 60) }')
        await inserted.acquire()
        await peer.begin("2", 'mutation { add(line: "two", seconds: 0) }')
        await becomes_true(lambda: bool(errors))
        with pytest.raises(ConnectionClosedError, match="1011"):
            await peer.hear()
    assert isinstance(errors[0], ConcurrentUse)
    assert "database.begin()" in str(errors[0])
    assert page.stored(LINES) == []
