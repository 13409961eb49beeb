"""Tests that an event which is sent before its work is committed is logged, and no other event."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from asgi import Socket, get
from conftest import ENTRY, WITH_MARIADB, Running
from pages import Page
from several import Entry
from sqlalchemy import delete, func, select, text, update
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, SyncDatabase
from asgi_dbsession.asgi.optional import events

pytestmark = pytest.mark.anyio
KINDS = WITH_MARIADB

Work = Callable[[Running], Awaitable[object]]
EVENT = "data: stored\n\n"
(QUOTED,) = re.findall(
    r"```text\n(An event of .*?)```", Page("docs/troubleshooting.md").text, re.DOTALL
)


@pytest.fixture(autouse=True)
def _nothing_was_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_warned", set())


def application(
    running: Running, *works: Work, kind: str = "text/event-stream", event: str = EVENT
) -> Starlette:
    """An application that works and then sends an event, for each of `works`."""

    async def body() -> AsyncIterator[str]:
        for work in works:
            await work(running)
            yield event

    async def answer(request: Request) -> StreamingResponse:
        await running.execute(select(ENTRY))
        return StreamingResponse(body(), media_type=kind)

    async def other(request: Request) -> StreamingResponse:
        return await answer(request)

    app = Starlette(routes=[Route("/other/{secret}", other), Route("/{secret:path}", answer)])
    app.add_middleware(DBSessionMiddleware, running.database)
    return app


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package logged."""
    return [each.getMessage() for each in caplog.records if each.name == "asgi_dbsession"]


async def insert(running: Running) -> None:
    """A statement."""
    await running.write("one")


async def flush(running: Running) -> None:
    """An object that the session forgets after its flush."""
    await add(running)
    await running.call("flush")


async def add(running: Running) -> None:
    """An object that will be flushed by COMMIT."""
    running.database.get_session().add(Entry(note="one"))


async def insert_in_savepoint(running: Running) -> None:
    """A savepoint that is released."""
    await in_savepoint(running, "commit")


async def in_savepoint(running: Running, end: str) -> None:
    savepoint = await running.call("begin_nested")
    if isinstance(running.database, SyncDatabase):
        await running.call("execute", ENTRY.insert().values(note="one"))
        getattr(savepoint, end)()
    else:
        await running.write("one")
        await getattr(savepoint, end)()


async def read(running: Running) -> None:
    """Reads, also those that begin a transaction."""
    await running.execute(select(ENTRY))
    await running.execute(select(func.lower("A")))
    await running.execute(text("SELECT 1"))


async def commit(running: Running) -> None:
    """What the page recommends."""
    await running.write("one")
    await running.call("commit")
    await running.execute(select(ENTRY))


async def flush_and_commit(running: Running) -> None:
    """The same with an object."""
    await flush(running)
    await running.call("commit")


async def roll_back(running: Running) -> None:
    """Work that COMMIT will not store."""
    await running.write("one")
    await running.call("rollback")


async def roll_back_savepoint(running: Running) -> None:
    """The same in a savepoint."""
    await in_savepoint(running, "rollback")


async def begin(running: Running) -> None:
    """The other way that the page recommends."""
    if isinstance(running.database, SyncDatabase):
        with running.database.begin() as session:
            session.execute(ENTRY.insert().values(note="one"))
    else:
        async with running.database.begin() as session:
            await session.execute(ENTRY.insert().values(note="one"))


async def nothing(running: Running) -> None:
    """No use of the database."""


async def insert_before_savepoint(running: Running) -> None:
    """A rollback to a later savepoint keeps the row."""
    await running.execute(ENTRY.insert().values(note="kept"))
    await in_savepoint(running, "rollback")


@pytest.mark.parametrize("work", [insert, flush, add, insert_in_savepoint, insert_before_savepoint])
async def test_an_event_before_its_commit_is_logged_once_for_each_route(
    running: Running, caplog: pytest.LogCaptureFixture, work: Work
) -> None:
    """The line names the route and the cure, and nothing that the client sent."""
    app = application(running, work, work, read)
    await get(app, "/raw")
    await get(app, "/raw")
    (line,) = warnings(caplog)
    assert "/{secret:path}" in line or "answer" in line
    assert "raw" not in line
    assert " ".join(QUOTED.split()).partition(" was ")[2] == line.partition(" was ")[2]


async def test_the_line_is_true(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """The client has read an event, and COMMIT refuses its work."""

    async def doomed(running: Running) -> None:
        await running.write("one")
        await running.doom()

    exchange = await get(application(running, doomed))
    assert exchange.body.decode().startswith(EVENT)
    assert not exchange.complete
    assert exchange.error is not None
    assert running.stored() == []
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    "statement",
    [
        update(Entry).values(note="two"),
        delete(Entry).where(ENTRY.c.id == 1),
        ENTRY.update().values(note="two"),
    ],
    ids=["UPDATE", "DELETE", "UPDATE of a table"],
)
async def test_each_statement_that_writes_counts(
    running: Running, caplog: pytest.LogCaptureFixture, statement: Any
) -> None:
    """Whether or not a row is found: only the database knows that."""
    await get(application(running, lambda running: running.execute(statement)))
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    "work",
    [nothing, read, commit, flush_and_commit, roll_back, roll_back_savepoint, begin],
)
async def test_an_event_without_uncommitted_work_is_not_logged(
    running: Running, caplog: pytest.LogCaptureFixture, work: Work
) -> None:
    """Whatever the session did before."""
    exchange = await get(application(running, work, nothing))
    assert exchange.body.decode() == EVENT * 2
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("kind", "event"), [("text/plain", EVENT), ("text/event-stream", ": still here\n\n")]
)
async def test_a_part_that_is_no_event_is_not_logged(
    running: Running, caplog: pytest.LogCaptureFixture, kind: str, event: str
) -> None:
    """An export sends parts too, and a comment only keeps the connection open."""
    await get(application(running, insert, kind=kind, event=event))
    assert warnings(caplog) == []
    assert running.stored() == ["one"]


async def test_the_last_event_waits_for_commit(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """So its promise is kept, and nothing is logged."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [[b"content-type", b"text/event-stream"]]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await running.write("one")
        await send({"type": "http.response.body", "body": EVENT.encode()})

    stored: list[Any] = []
    await get(
        DBSessionMiddleware(app, running.database),
        on_message=lambda _: stored.append(running.stored()),
    )
    assert stored == [[], ["one"]]
    assert warnings(caplog) == []


async def test_headers_that_can_be_read_only_once_are_left_to_the_server(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a response has its headers, and no warning."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = iter([(b"content-type", b"text/event-stream")])
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await running.write("one")
        await send({"type": "http.response.body", "body": EVENT.encode(), "more_body": True})
        await send({"type": "http.response.body"})

    exchange = await get(DBSessionMiddleware(app, running.database))
    assert list(exchange.messages[0]["headers"]) == [(b"content-type", b"text/event-stream")]
    assert running.stored() == ["one"]


async def test_below_another_middleware_it_is_logged_too(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The task that sends the event is not the task that did the work."""
    inner = application(running, nothing, insert)

    async def pass_on(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    inner.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    await get(DBSessionMiddleware(inner, running.database))
    assert len(warnings(caplog)) == 1


async def test_a_message_of_a_websocket_is_not_logged(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Its work is committed before it is sent."""

    async def listen(websocket: WebSocket) -> None:
        await websocket.accept()
        await running.write("one")
        await websocket.send_text(EVENT)
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", listen)])
    await Socket(DBSessionMiddleware(app, running.database)).run()
    assert running.stored() == ["one"]
    assert warnings(caplog) == []


async def test_an_event_may_be_any_kind_of_bytes() -> None:
    """Starlette passes on what the application gives it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send(
            {"type": "http.response.body", "body": memoryview(b"data: x"), "more_body": True}
        )
        await send({"type": "http.response.body", "body": bytearray()})

    exchange = await get(DBSessionMiddleware(app, AsyncDatabase("sqlite://")))
    assert (exchange.error, exchange.complete) == (None, True)
