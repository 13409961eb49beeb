"""On a WebSocket, acknowledged work is stored, and no connection is held during a wait."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from asgi import Exchange, Message, Socket, get, respond
from conftest import ENTRY, Real, Running, becomes_true, checked_out, real_database
from several import Entry
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from asgi_dbsession import (
    AsyncDatabase,
    DBSessionMiddleware,
    NoSession,
    SessionClosed,
    get_session,
    set_rollback,
)

pytestmark = pytest.mark.anyio

ACCEPT: Message = {"type": "websocket.accept"}


def text(message: str) -> Message:
    return {"type": "websocket.send", "text": message}


def close(code: int | None) -> Message:
    return {"type": "websocket.close"} | ({} if code is None else {"code": code})


def socket(
    running: Running, app: Callable[[Any, Any, Any], Coroutine[Any, Any, None]], **options: Any
) -> Socket:
    return Socket(DBSessionMiddleware(app, running.database), **options)


async def test_what_is_sent_is_stored_before_the_peer_hears_of_it(running: Running) -> None:
    """The acceptance, each message and a normal close come after the COMMIT of the work before."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await running.write("before the acceptance")
        await send(ACCEPT)
        await running.write("before a message")
        await send(text("stored"))
        await running.write("before the close")
        await send(close(1001))

    def look(message: Message) -> None:
        seen.append((message["type"], running.stored()[-1], checked_out(running.database)))

    await socket(running, app, on_message=look).run()
    assert seen == [
        ("websocket.accept", "before the acceptance", 0),
        ("websocket.send", "before a message", 0),
        ("websocket.close", "before the close", 0),
    ]


async def test_nothing_is_held_while_the_peer_is_silent(running: Running) -> None:
    """Earlier work is stored, and the connection is back in its pool."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        await running.write("before waiting")
        while (await receive())["type"] == "websocket.receive":
            await running.execute(select(ENTRY))  # a read would hold a connection too

    peer = socket(running, app)
    serving = asyncio.create_task(peer.run())
    for _ in range(3):
        await peer.waits.wait()
        assert running.stored() == ["before waiting"]
        await running.assert_clean()
        peer.say("go on")
    peer.hang_up()
    await serving


async def test_a_peer_that_goes_away_loses_nothing_that_was_acknowledged(
    running: Running,
) -> None:
    """The usual loop ends with an exception, which rolls back only unacknowledged work."""

    class Disconnected(Exception):
        pass

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        try:
            while True:
                message = await receive()
                if message["type"] == "websocket.disconnect":
                    raise Disconnected
                await running.write(message["text"])
                await send(text("stored " + message["text"]))
        finally:
            await running.write("not acknowledged")

    peer = socket(running, app)
    for word in ("one", "two"):
        peer.say(word)
    peer.hang_up()
    await peer.run()
    assert isinstance(peer.error, Disconnected)
    assert peer.heard == ["stored one", "stored two"]
    assert running.stored() == ["one", "two"]


async def test_what_is_done_after_the_peer_went_away_is_stored_on_a_return(
    running: Running,
) -> None:
    """A handler that stores a last row and returns has succeeded."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        assert (await receive())["type"] == "websocket.disconnect"
        await running.write("left")

    peer = socket(running, app)
    peer.hang_up()
    await peer.run()
    assert running.stored() == ["left"]


@pytest.mark.parametrize(
    "refusal",
    [
        [close(1000)],
        [close(None)],
        [{"type": "websocket.http.response.start", "status": 200, "headers": []}],
        [],
    ],
    ids=["close", "close without a code", "response", "return"],
)
async def test_a_denial_rolls_back(running: Running, refusal: list[Message]) -> None:
    """A socket that was never accepted stores nothing, for any code or status."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await running.write("denied")
        for message in refusal:
            await send(message)
            await running.assert_clean()
        if refusal and refusal[0]["type"].endswith("start"):
            await send({"type": "websocket.http.response.body", "body": b"no"})
        await running.write("after the denial")

    peer = socket(running, app)
    await peer.run()
    assert len(peer.messages) == len(refusal) + (refusal[:1] != [] and "status" in refusal[0])
    assert running.stored() == []


@pytest.mark.parametrize(
    "refusal", [close(1008), {"type": "websocket.http.response.start", "status": 401}]
)
async def test_set_rollback_decides_on_a_denial_too(running: Running, refusal: Message) -> None:
    """A failed login can be counted, like a status of 401 over HTTP."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await running.write("failed login")
        set_rollback(False)
        await send(refusal)
        if refusal["type"].endswith("start"):
            await send({"type": "websocket.http.response.body", "body": b"no"})

    await socket(running, app).run()
    assert running.stored() == ["failed login"]


@pytest.mark.parametrize("helps", ["with a commit", "with the work"])
async def test_a_message_commits_what_a_task_did_that_has_ended(real: Real, helps: str) -> None:
    """The handler waits for the task: `asyncio.wait_for` starts one before Python 3.12."""
    database = real.describe()
    if not isinstance(database, AsyncDatabase):
        pytest.skip("what threads do says nothing of tasks")
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        session = database.get_session()
        insert = session.execute(ENTRY.insert().values(note="helped"))
        if helps == "with a commit":
            await insert
            await asyncio.create_task(session.commit())
        else:
            await asyncio.create_task(insert)
        await session.execute(ENTRY.insert().values(note="alone"))
        await send(text("stored"))

    def look(message: Message) -> None:
        seen.append((real.stored(), checked_out(database)))

    async with database:
        await Socket(DBSessionMiddleware(app, database), on_message=look).run()
    assert seen[1] == (["helped", "alone"], 0)


@pytest.mark.parametrize(
    ("code", "stored"), [(1000, ["work"]), (None, ["work"]), (1011, []), (4000, [])]
)
async def test_an_error_as_close_code_rolls_back(
    running: Running, code: int, stored: list[str]
) -> None:
    """All later work of the handler is rolled back too."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        await running.write("work")
        await send(close(code))
        if stored == []:
            await running.write("after the close")

    await socket(running, app).run()
    assert running.stored() == stored


async def test_an_exception_rolls_back(running: Running) -> None:
    """The error reaches the server, and acknowledged work stays stored."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        await running.write("acknowledged")
        await send(text("ok"))
        await running.write("not acknowledged")
        raise LookupError

    peer = await socket(running, app).run()
    assert isinstance(peer.error, LookupError)
    assert running.stored() == ["acknowledged"]


@pytest.mark.parametrize("where", ["send", "receive", "accept", "close"])
async def test_a_failed_commit_is_never_followed_by_a_message(running: Running, where: str) -> None:
    """The error stops a handler that catches exceptions too, and reaches the server unchanged."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if where != "accept":
            await send(ACCEPT)
        await running.write("doomed")
        await running.doom()
        for _ in range(2):
            try:
                if where == "receive":
                    await receive()
                else:
                    await send({"send": text("ok"), "accept": ACCEPT, "close": close(1000)}[where])
            except Exception:
                pass

    peer = socket(running, app)
    await peer.run()
    assert isinstance(peer.error, IntegrityError)
    assert peer.messages == ([] if where == "accept" else [ACCEPT])
    assert running.stored() == []


async def test_not_even_an_unknown_message_follows_a_failed_commit(running: Running) -> None:
    """Later ASGI versions may have other messages that acknowledge work."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        await running.doom()
        for message in (text("ok"), {"type": "websocket.surprise"}):
            try:
                await send(message)
            except BaseException as error:
                stopped_by.append(error)

    stopped_by: list[BaseException] = []
    peer = await socket(running, app).run()
    assert len(stopped_by) == 2
    assert isinstance(peer.error, IntegrityError)
    assert peer.messages == [ACCEPT]


async def test_the_handler_can_commit_by_itself_and_answer_a_failure(running: Running) -> None:
    """A refused row closes only the unit of work, not the socket."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        await running.doom()
        try:
            await running.call("commit")
        except IntegrityError:
            await running.call("rollback")
            await send(text("refused"))
        await running.write("next")
        await send(text("stored"))

    peer = await socket(running, app).run()
    assert peer.error is None
    assert peer.heard == ["refused", "stored"]
    assert running.stored() == ["next"]


async def test_set_rollback_speaks_of_the_work_until_the_next_message(running: Running) -> None:
    """The decision applies to the next message, and is forgotten after it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        await running.write("undone")
        set_rollback(True)
        await send(text("never mind"))
        await running.write("done")
        await send(text("stored"))

    await socket(running, app).run()
    assert running.stored() == ["done"]


async def test_set_rollback_about_nothing_is_forgotten_with_the_next_message(
    running: Running,
) -> None:
    """Otherwise it would silently roll back later work."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        set_rollback(True)
        await send(ACCEPT)
        await running.write("done")
        await send(text("stored"))

    await socket(running, app).run()
    assert running.stored() == ["done"]


@pytest.mark.parametrize("real", ["sqlite", "asyncpg"], indirect=True)
async def test_a_message_of_a_task_at_work_does_not_commit_what_another_task_is_at(
    running: Running,
) -> None:
    """The work is not stored, for a sent and a refused message: the other task fails later."""
    half_done, go_on = asyncio.Event(), asyncio.Event()

    async def fail() -> None:
        await running.write("half done")
        half_done.set()
        await go_on.wait()
        raise LookupError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        other = asyncio.create_task(fail())
        await half_done.wait()
        await running.write("mine")
        try:
            await send(text("not stored"))
        finally:
            go_on.set()
            await other

    await socket(running, app).run()
    assert running.stored() == []


@pytest.mark.parametrize("work", ["a statement", "an object", "a joined block"])
async def test_a_message_does_not_commit_what_another_task_is_at(
    running: Running, work: str
) -> None:
    """Otherwise half of its work would be stored; with `begin()` all of it is stored."""
    if running.real.is_sync:
        pytest.skip("what threads do says nothing of tasks")
    half_done, go_on = asyncio.Event(), asyncio.Event()

    async def write(send: Any) -> None:
        if work == "a statement":
            await running.write("one")
        elif work == "a joined block":
            database: Any = running.database
            async with database.begin(join=True):
                await running.write("one")
        else:
            running.database.get_session().add(Entry("one"))
        half_done.set()
        await go_on.wait()
        raise LookupError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        writer = asyncio.create_task(write(send))
        await half_done.wait()
        await send(text("a clock, say"))
        go_on.set()
        await writer

    peer = await socket(running, app).run()
    assert peer.heard == ["a clock, say"]
    assert running.stored() == []


@pytest.mark.parametrize("real", ["sqlite", "asyncpg"], indirect=True)
async def test_a_message_rolls_back_what_a_failed_task_did(running: Running) -> None:
    """The failed task holds no connection, and the next work is not mixed with its work."""
    seen = []

    async def fail() -> None:
        await running.write("half done")
        raise LookupError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        await asyncio.wait([asyncio.create_task(fail())])
        await send(text("sorry"))
        await running.write("mine")
        await send(text("stored"))

    def look(_: Message) -> None:
        seen.append((running.stored(), checked_out(running.database)))

    peer = await socket(running, app, on_message=look).run()
    assert peer.error is None
    assert seen == [([], 0), ([], 0), (["mine"], 0)]


async def test_a_reader_and_a_writer_task_have_a_unit_of_work_each(real: Real) -> None:
    """Sockets with several tasks should use `database.begin()`, as documented."""
    if real.is_sync:
        pytest.skip("an async handler is the point")
    database = real.describe()
    assert isinstance(database, AsyncDatabase)

    async def store(note: str) -> None:
        async with database.begin() as session:
            await session.execute(ENTRY.insert().values(note=note))
            assert get_session() is session

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)

        async def write() -> None:
            for number in range(3):
                await store(f"written {number}")
                await send(text(f"written {number}"))

        writer = asyncio.create_task(write())
        while (message := await receive())["type"] == "websocket.receive":
            await store(message["text"])
        await writer

    peer = Socket(DBSessionMiddleware(app, database))
    peer.say("read 0")
    peer.say("read 1")
    peer.hang_up()
    async with database:
        await peer.run()
        await real.assert_clean(database)
    assert peer.error is None
    assert sorted(real.stored()) == ["read 0", "read 1", "written 0", "written 1", "written 2"]


@pytest.mark.parametrize(("refused", "sent"), [((), [1011]), ((1011,), [4500]), ((1011, 4500), [])])
async def test_a_peer_is_not_left_waiting_for_what_another_task_could_not_send(
    running: Running, refused: tuple[int, ...], sent: list[int]
) -> None:
    """The socket is closed although its main task waits for the client; nothing is stored.

    Also by daphne, which refuses 1011; and if no close can be sent, the error is the first one.
    """

    def refuse(message: Message) -> None:
        if message.get("code") in refused:
            raise OSError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def answer() -> None:
            await running.write("twice")
            await running.doom()
            await send(text("stored"))

        await receive()
        await send(ACCEPT)
        await receive()
        answering = asyncio.create_task(answer())
        await receive()
        await asyncio.gather(answering, return_exceptions=True)

    peer = socket(running, app, on_message=refuse)
    serving = asyncio.create_task(peer.run())
    peer.say("store this")
    if sent:
        await becomes_true(lambda: len(peer.messages) > 1)
    peer.hang_up()
    await serving
    assert peer.messages == [ACCEPT, *map(close, sent)]
    assert isinstance(peer.error, running.real.refusal)
    assert running.stored() == []


async def test_idle_sockets_do_not_delay_a_request(tmp_path: Any) -> None:
    """Two hundred sockets have read and written, on a pool of two."""
    real = real_database("asyncpg", tmp_path)
    database = real.describe(pool_size=2, max_overflow=0, pool_timeout=20)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            count = await get_session().scalar(select(func.count()).select_from(ENTRY))
            await respond(send, body=str(count).encode())
            return
        await receive()
        await get_session().execute(ENTRY.insert().values(note=scope["path"]))
        await send(ACCEPT)
        await get_session().execute(select(ENTRY))
        await receive()

    served = DBSessionMiddleware(app, database)
    peers = [Socket(served, f"/{number}") for number in range(200)]
    async with database:
        serving = [asyncio.create_task(peer.run()) for peer in peers]
        await asyncio.gather(*(peer.waits.wait() for peer in peers))
        assert checked_out(database) == 0
        answer = await get(served)
        assert (answer.status, answer.body) == (200, b"200")
        for peer in peers:
            peer.hang_up()
        await asyncio.gather(*serving)
    real.reader.dispose()


async def test_a_helper_works_the_same_on_a_socket_as_on_http(running: Running) -> None:
    """`get_session()`, ten calls deep, needs no information about the request."""

    async def authenticate() -> None:
        kind = running.database.get_session().info["scope"]["type"]
        await running.write(f"seen by {kind}")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await authenticate()
        if scope["type"] == "http":
            await respond(send)
        else:
            await receive()
            await send(ACCEPT)

    served = DBSessionMiddleware(app, running.database)
    await Socket(served).run()
    await Exchange(served).run()
    assert running.stored() == ["seen by websocket", "seen by http"]


async def test_a_socket_that_is_over_takes_its_session_along(running: Running) -> None:
    """A task after the end of the socket gets an error, never a connection."""
    escaped = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        escaped.append(running.database.get_session())
        await receive()
        await send(ACCEPT)

    await socket(running, app).run()
    with pytest.raises(SessionClosed, match="begin"):
        result = escaped[0].execute(select(ENTRY))
        if not running.real.is_sync:
            await result
    with pytest.raises(NoSession):
        running.database.get_session()


async def test_frameworks_see_their_messages_untouched(running: Running) -> None:
    """Messages are not changed, added or delayed, extensions included."""
    sent: list[Message] = [
        {"type": "websocket.accept", "subprotocol": "chat", "headers": [(b"a", b"b")]},
        {"type": "websocket.send", "bytes": b"\x00"},
        {"type": "websocket.future", "x": 1},
        {"type": "websocket.close", "code": 3000, "reason": "because"},
    ]
    received = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        received.append(await receive())
        for message in sent:
            await send(message)
        received.append(await receive())

    peer = socket(running, app)
    peer.hang_up(3000)
    await peer.run()
    assert peer.messages == sent
    assert received == [
        {"type": "websocket.connect"},
        {"type": "websocket.disconnect", "code": 3000},
    ]
