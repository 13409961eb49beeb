"""Tests that a message stores the work of its own task, and nothing of another task at work."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from anyio import to_thread
from asgi import Socket, get
from conftest import ENTRY, Running
from several import Entry, engine_of
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from asgi_dbsession import ConcurrentUse, DBSessionMiddleware, set_rollback

pytestmark = pytest.mark.anyio
KINDS = ("sqlite", "asyncpg", "psycopg")

ACCEPT = {"type": "websocket.accept"}
CLOSE = {"type": "websocket.close", "code": 1000}
Send = Callable[[Any], Awaitable[None]]


def say(words: str) -> dict[str, str]:
    """A message to the client."""
    return {"type": "websocket.send", "text": words}


async def talk(running: Running, handler: Callable[[Send], Awaitable[None]]) -> Socket:
    """Accept a WebSocket, run a handler, and close the WebSocket."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        await handler(send)
        await send(CLOSE)

    return await Socket(DBSessionMiddleware(app, running.database)).run()


async def beat(send: Send, after: asyncio.Event, then: asyncio.Event) -> None:
    """Send a heartbeat in the middle of the work of another task."""
    await after.wait()
    await send(say("heartbeat"))
    then.set()


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("kind", ["websocket", "body"])
async def test_work_that_begins_while_a_commit_begins_is_not_in_it(
    running: Running, *, kind: str, joined: bool
) -> None:
    """Its statement waits for the COMMIT, and its rollback rolls back all of it."""
    about_to_send = asyncio.Event()

    async def fail(send: Send) -> None:
        await about_to_send.wait()
        if joined:
            database: Any = running.database
            async with database.begin(join=True):
                await half()
        else:
            await half()

    async def half() -> None:
        await running.write("half")
        await asyncio.sleep(0.05)
        raise LookupError

    async def succeed(send: Send) -> None:
        await running.write("own")
        about_to_send.set()
        last = {"type": "http.response.body", "body": b"own"}
        await send(say("own") if kind == "websocket" else last)

    async def both(send: Send) -> None:
        await asyncio.gather(fail(send), succeed(send), return_exceptions=True)

    if kind == "websocket":
        assert (await talk(running, both)).heard == ["own"]
    else:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await both(send)

        assert (await get(DBSessionMiddleware(app, running.database))).body == b"own"
    assert running.stored() == ["own"]
    await running.assert_clean()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("real", ["sqlite-sync"], indirect=True)
async def test_a_blocking_statement_does_not_wait_for_a_commit_that_needs_its_event_loop(
    running: Running,
) -> None:
    """The event loop would stand still for ever."""
    about_to_send = asyncio.Event()
    session: Any = None

    async def block() -> None:
        await about_to_send.wait()
        session.execute(text("SELECT 1"))

    async def handler(send: Send) -> None:
        nonlocal session
        session = running.database.get_session()
        task = asyncio.create_task(block())
        await running.write("own")
        about_to_send.set()
        await send(say("own"))
        await asyncio.wait([task])
        assert isinstance(task.exception(), (ConcurrentUse, type(None)))

    peer = await talk(running, handler)
    assert (peer.heard, peer.error) == (["own"], None)
    assert running.stored() == ["own"]


@pytest.mark.parametrize("who", ["the task", "a child task", "a thread"])
@pytest.mark.parametrize("other_decides", [True, False])
async def test_a_heartbeat_does_not_use_up_the_decision_of_another_task(
    running: Running, who: str, *, other_decides: bool
) -> None:
    """The decision waits for the next message of the task whose work it is about."""
    decided, sent = asyncio.Event(), asyncio.Event()

    async def decide() -> None:
        set_rollback(True)

    async def other(send: Send) -> None:
        if other_decides:
            await decided.wait()
            set_rollback(False)
        await beat(send, decided, sent)

    async def handler(send: Send) -> None:
        task = asyncio.create_task(other(send))
        await running.write("refused")
        if who == "the task":
            set_rollback(True)
        elif who == "a child task":
            await asyncio.create_task(decide())
        else:
            await to_thread.run_sync(set_rollback, True)
        decided.set()
        await sent.wait()
        await send(say("refused"))
        await running.write("kept")
        await send(say("kept"))
        await task

    assert (await talk(running, handler)).heard == ["heartbeat", "refused", "kept"]
    assert running.stored() == ["kept"]


async def test_a_decision_waits_for_work_that_the_end_of_the_body_leaves(
    running: Running,
) -> None:
    """Another task is at work on the session, so it is committed when the application returns."""
    at_work, body_sent = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await running.write("other")
        at_work.set()
        await body_sent.wait()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        task = asyncio.create_task(work())
        await at_work.wait()
        await running.write("own")
        set_rollback(True)
        await send({"type": "http.response.body", "body": b"x"})
        body_sent.set()
        await task

    await get(DBSessionMiddleware(app, running.database))
    assert running.stored() == []


async def test_a_decision_during_the_commit_of_a_response_is_about_what_follows(
    running: Running,
) -> None:
    """The response is committed, and the work after it is rolled back."""
    session: Any = None

    def decide(_session: Session) -> None:
        set_rollback(True)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal session
        await running.write("response")
        session = running.database.get_session()
        event.listen(getattr(session, "sync_session", session), "after_commit", decide, once=True)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await running.write("body")
        await send({"type": "http.response.body", "body": b"x"})

    await get(DBSessionMiddleware(app, running.database))
    assert running.stored() == ["response"]


async def test_an_attribute_is_of_the_task_that_used_the_session_last(running: Running) -> None:
    """A heartbeat does not commit what another task has changed in memory."""
    changed, sent = asyncio.Event(), asyncio.Event()

    async def handler(send: Send) -> None:
        task = asyncio.create_task(beat(send, changed, sent))
        entry = Entry("before")
        running.database.get_session().add(entry)
        await send(say("before"))
        entry.note = "half"
        changed.set()
        await sent.wait()
        await task
        raise LookupError

    peer = await talk(running, handler)
    assert (peer.heard, type(peer.error)) == (["before", "heartbeat"], LookupError)
    assert running.stored() == ["before"]


async def test_an_attribute_is_committed_by_the_next_message_of_its_task(
    running: Running,
) -> None:
    """The task that used the session last, or any task after it has ended, sends the message."""

    async def store() -> Entry:
        entry = Entry("first")
        running.database.get_session().add(entry)
        await running.call("commit")
        return entry

    async def handler(send: Send) -> None:
        entry = await asyncio.create_task(store())
        entry.note = "second"
        await send(say("second"))
        assert running.stored() == ["second"]
        await running.call("refresh", entry)
        await send(say("read"))
        entry.note = "third"
        await send(say("third"))
        assert running.stored() == ["third"]

    peer = await talk(running, handler)
    assert (peer.heard, peer.error) == (["second", "read", "third"], None)


@pytest.mark.parametrize("real", ["asyncpg", "psycopg"], indirect=True)
async def test_a_cancelled_message_lets_its_task_go_on_with_the_session(running: Running) -> None:
    """Before the message, the work of a failed task on another database is rolled back."""
    sender: list[asyncio.Task[Any]] = []

    async def fail() -> None:
        await running.execute(ENTRY.insert().values(note="half"), database=other)
        raise LookupError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        await asyncio.wait([asyncio.create_task(fail())])
        await running.write("own")
        sender.append(cast("asyncio.Task[Any]", asyncio.current_task()))
        with pytest.raises(asyncio.CancelledError):
            await send(say("not sent"))
        async with asyncio.timeout(5):
            await running.write("after")
        await send(say("sent"))

    async with running.real.describe() as other:
        event.listen(
            engine_of(Running(running.real, other)), "rollback", lambda _: sender[0].cancel()
        )
        socket = Socket(DBSessionMiddleware(app, running.database, other))
        await socket.run()
    assert socket.messages == [ACCEPT, say("sent")]
    assert running.stored() == ["own", "after"]
