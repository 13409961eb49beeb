"""Tests the promises of the middleware, with every kind of database."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from asgi import Exchange, Message, get, respond
from conftest import ENTRY, WITH_MARIADB, Real, Running, checked_out
from sqlalchemy import event, select

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DBSessionMiddleware,
    NoSession,
    SessionClosed,
    SyncDatabase,
    get_session,
    get_sync_session,
    set_rollback,
)

pytestmark = pytest.mark.anyio
KINDS = WITH_MARIADB


def serving(running: Running, app: Any, **options: Any) -> DBSessionMiddleware:
    """Wrap the middleware around a plain ASGI function."""
    return DBSessionMiddleware(app, running.database, **options)


async def test_a_request_that_asks_for_no_session_creates_none(real: Real) -> None:
    """Nothing is created before the first use, so even a stopped database causes no error."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)

    assert (await get(DBSessionMiddleware(app, real.describe()))).status == 200


async def test_a_session_holds_no_connection_until_its_first_statement(running: Running) -> None:
    """`get_session()` opens a session; the first statement checks out a connection."""
    held = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        running.database.get_session()
        held.append(checked_out(running.database))
        await running.execute(select(ENTRY))
        held.append(checked_out(running.database))
        await respond(send)

    await get(serving(running, app))
    assert held == [0, 1]


async def test_everything_is_stored_and_given_back_before_the_start_is_sent(
    running: Running,
) -> None:
    """When the server gets the status, the row is stored and the connection is in the pool."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        await respond(send, 201)

    def look(message: Any) -> None:
        seen.append((message["type"], running.stored(), checked_out(running.database)))

    exchange = await get(serving(running, app), on_message=look)
    assert exchange.status == 201
    assert seen == [("http.response.start", ["kept"], 0), ("http.response.body", ["kept"], 0)]


@pytest.mark.parametrize("status", [200, 204, 302, 399])
async def test_a_status_below_400_commits(running: Running, status: int) -> None:
    """A redirect after a POST is a success too."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        await respond(send, status)

    assert (await get(serving(running, app))).status == status
    assert running.stored() == ["kept"]


@pytest.mark.parametrize("status", [400, 404, 422, 500, 503])
async def test_a_status_from_400_on_rolls_back_before_it_is_sent(
    running: Running, status: int
) -> None:
    """A returned error and a raised error both store nothing."""
    held = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        await respond(send, status)

    exchange = await get(
        serving(running, app),
        on_message=lambda _: held.append(checked_out(running.database)),
    )
    assert exchange.status == status
    assert held == [0, 0]
    assert running.stored() == []


async def test_an_exception_rolls_back_and_goes_on(running: Running) -> None:
    """The server gets the same exception that the handler raised."""
    error = LookupError("no such thing")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        raise error

    exchange = await get(serving(running, app))
    assert exchange.error is error
    assert exchange.messages == []
    assert running.stored() == []


async def test_no_response_at_all_rolls_back(running: Running) -> None:
    """A handler that returns without a response has not succeeded."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")

    await get(serving(running, app))
    assert running.stored() == []


async def test_a_failed_commit_sends_nothing(running: Running) -> None:
    """Nothing of the response is sent, nothing is stored; the server gets the original error."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        await running.doom()
        await respond(send, 201)

    exchange = await get(serving(running, app))
    assert exchange.messages == []
    assert isinstance(exchange.error, running.real.refusal)
    assert running.stored() == []


async def test_after_a_failed_commit_the_next_requests_are_unharmed(running: Running) -> None:
    """The connection is returned clean, also on SQLite, where the transaction is still open."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write(scope["path"])
        if scope["path"] == "/doomed":
            await running.doom()
        await respond(send)

    await get(serving(running, app), "/doomed")
    await running.assert_clean()
    for number in range(5):
        assert (await get(serving(running, app), f"/{number}")).status == 200
    assert running.stored() == [f"/{number}" for number in range(5)]


async def test_an_application_that_swallows_a_failed_commit_cannot_answer_it(
    running: Running,
) -> None:
    """Everything after the failure is not sent, and the original error is raised."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.doom()
        try:
            await respond(send, 201)
        except BaseException:
            await respond(send, 500, b"something else")

    exchange = await get(serving(running, app))
    assert exchange.messages == []
    assert isinstance(exchange.error, running.real.refusal)


@pytest.mark.parametrize("of", ["the response", "the body"])
async def test_no_handler_for_exceptions_sees_a_failed_commit(running: Running, of: str) -> None:
    """`except Exception` around the handler, as in frameworks, does not catch it."""
    met = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if of == "the body":
            await send({"type": "http.response.start", "status": 201, "headers": []})
        await running.doom()
        try:
            if of == "the body":
                await send({"type": "http.response.body"})
            else:
                await respond(send, 201)
        except Exception as error:
            met.append(error)
            raise

    exchange = await get(serving(running, app))
    assert met == []
    assert not exchange.complete
    assert isinstance(exchange.error, running.real.refusal)


async def test_on_commit_error_makes_the_response(running: Running) -> None:
    """The client gets the response that the application makes of a failed COMMIT."""
    seen = []

    def conflict(error: Exception) -> Any:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            await respond(send, 409, b"conflict")

        seen.append(error)
        return answer

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.doom()
        await respond(send, 201)

    exchange = await get(serving(running, app, on_commit_error=conflict))
    assert (exchange.status, exchange.body, exchange.error) == (409, b"conflict", None)
    assert isinstance(seen[0], running.real.refusal)


async def test_on_commit_error_that_returns_none_leaves_the_exception(running: Running) -> None:
    """The function can answer some errors, and leave other errors to the server."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.doom()
        await respond(send, 201)

    exchange = await get(serving(running, app, on_commit_error=lambda _: None))
    assert exchange.messages == []
    assert isinstance(exchange.error, running.real.refusal)


async def test_commit_when_replaces_the_rule(running: Running) -> None:
    """The rule gets the status, and its result decides."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write(scope["path"])
        await respond(send, int(scope["path"][1:]))

    middleware = serving(running, app, commit_when=lambda status: status in (200, 409))
    for status in (200, 201, 409, 500):
        await get(middleware, f"/{status}")
    assert running.stored() == ["/200", "/409"]


@pytest.mark.parametrize(("rollback", "status", "kept"), [(True, 200, []), (False, 401, ["it"])])
async def test_set_rollback_overrides_the_status(
    running: Running, status: int, kept: list[str], *, rollback: bool
) -> None:
    """A success can be rolled back, and a failed login can be counted."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("it")
        set_rollback(rollback)
        await respond(send, status)

    assert (await get(serving(running, app))).status == status
    assert running.stored() == kept


async def test_set_rollback_false_does_not_save_what_an_exception_broke(running: Running) -> None:
    """`set_rollback` overrides the status; an exception that reaches the server has no status."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("lost")
        set_rollback(False)
        raise LookupError

    await get(serving(running, app))
    assert running.stored() == []


async def test_early_hints_and_unknown_messages_pass_untouched_and_at_once(
    running: Running,
) -> None:
    """Only the start and the end of a response end the transaction."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        await send({"type": "http.response.early_hint", "links": [b"</a.css>"]})
        await send({"type": "http.response.debug", "info": {"template": "x"}})
        await send({"type": "http.something.new", "value": 1})
        await respond(send)

    exchange = await get(
        serving(running, app), on_message=lambda message: seen.append(running.stored())
    )
    assert exchange.kinds == [
        "response.early_hint",
        "response.debug",
        "something.new",
        "response.start",
        "response.body",
    ]
    assert exchange.messages[2] == {"type": "http.something.new", "value": 1}
    assert seen == [[], [], [], ["kept"], ["kept"]]


async def test_the_start_is_never_held_back_for_a_body(running: Running) -> None:
    """Server-sent events get their headers at once, and hold no connection between two events."""
    go_on = asyncio.Event()
    held = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        held.append(checked_out(running.database))
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"event"})

    exchange = Exchange(serving(running, app))
    request = asyncio.create_task(exchange.run())
    while exchange.status is None:
        await asyncio.sleep(0.001)
    assert running.stored() == ["kept"]
    assert not exchange.complete
    go_on.set()
    await request
    assert held == [0]


async def test_a_streaming_body_goes_on_with_the_session_as_a_unit_of_its_own(
    running: Running,
) -> None:
    """Work of a body is stored before its last message is sent."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = running.database.get_session()
        await running.write("handler")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await running.write("body")
        assert running.database.get_session() is session
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        await send({"type": "http.response.body", "body": b"end"})

    exchange = await get(
        serving(running, app),
        on_message=lambda message: seen.append((message.get("body"), running.stored())),
    )
    assert exchange.complete
    stored = ["handler", "body"]
    assert seen == [(None, ["handler"]), (b"part", ["handler"]), (b"end", stored)]


async def test_an_exception_in_a_streaming_body_rolls_back_the_body_only(running: Running) -> None:
    """Work that the start acknowledged stays stored."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("handler")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await running.write("body")
        raise LookupError

    exchange = await get(serving(running, app))
    assert isinstance(exchange.error, LookupError)
    assert running.stored() == ["handler"]


async def test_a_body_that_was_cut_short_is_not_half_stored(running: Running) -> None:
    """If a client disconnects, Starlette cancels its stream and catches the cancellation itself."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("handler")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await running.write("half")
        await send({"type": "http.response.body", "body": b"part", "more_body": True})

    await get(serving(running, app))
    assert running.stored() == ["handler"]


@pytest.mark.parametrize("late", [False, True], ids=["before the start", "after the end"])
async def test_a_body_that_no_server_takes_acknowledges_nothing(
    running: Running, *, late: bool
) -> None:
    """Earlier work is rolled back because of the error."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if late:
            await respond(send)
        await running.write("refused")
        await send({"type": "http.response.body"})

    exchange = await get(serving(running, app))
    assert isinstance(exchange.error, AssertionError)
    assert running.stored() == []


@pytest.mark.parametrize("status", [200, 404])
async def test_work_after_the_response_is_a_unit_of_its_own(running: Running, status: int) -> None:
    """A background task is committed at its end, also after an error response."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("handler")
        await respond(send, status)
        assert checked_out(running.database) == 0
        await running.write("background")

    await get(serving(running, app))
    assert running.stored() == (["handler", "background"] if status == 200 else ["background"])


async def test_a_start_that_was_made_before_the_work_waits_for_it(running: Running) -> None:
    """The time of sending counts, not the time of the call of `send`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        start = send({"type": "http.response.start", "status": 200, "headers": []})
        await running.write("kept")
        await start
        raise LookupError("after the start")

    exchange = await Exchange(DBSessionMiddleware(app, running.database)).run()
    assert isinstance(exchange.error, LookupError)
    assert running.stored() == ["kept"]


async def test_a_background_task_that_fails_is_rolled_back(running: Running) -> None:
    """The exception of the task reaches the server, as without the middleware."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("handler")
        await respond(send)
        await running.write("background")
        raise LookupError

    exchange = await get(serving(running, app))
    assert isinstance(exchange.error, LookupError)
    assert running.stored() == ["handler"]


async def test_a_background_task_whose_commit_fails_is_reported(running: Running) -> None:
    """The client already has its response, but the error is not silent."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        await running.write("background")
        await running.doom()

    exchange = await get(serving(running, app, on_commit_error=lambda _: respond))
    assert exchange.status == 200
    assert isinstance(exchange.error, running.real.refusal)
    assert running.stored() == []


async def test_set_rollback_holds_for_one_unit_of_work(running: Running) -> None:
    """A rollback of the handler does not affect the background task after it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("handler")
        set_rollback(True)
        await respond(send)
        await running.write("background")

    await get(serving(running, app))
    assert running.stored() == ["background"]


async def test_set_rollback_of_a_body_does_not_hold_for_the_background_task(
    running: Running,
) -> None:
    """Handler, body and background task are one unit of work each."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        running.database.get_session()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await running.write("body")
        set_rollback(True)
        await send({"type": "http.response.body"})
        await running.write("background")

    await get(serving(running, app))
    assert running.stored() == ["background"]


async def test_set_rollback_of_a_handler_without_a_session_is_over_with_its_response(
    running: Running,
) -> None:
    """`set_rollback` was about the handler, which had no work."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        set_rollback(True)
        await respond(send)
        await running.write("background")

    await get(serving(running, app))
    assert running.stored() == ["background"]


async def test_set_rollback_of_a_handler_without_a_session_does_not_hold_for_the_body(
    running: Running,
) -> None:
    """The body is a unit of work of its own, even if the handler had nothing to roll back."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        set_rollback(True)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await running.write("body")
        await send({"type": "http.response.body"})

    await get(serving(running, app))
    assert running.stored() == ["body"]


async def test_set_rollback_of_a_body_that_did_nothing_is_over_with_it(running: Running) -> None:
    """Otherwise the work of the background task would be lost."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        set_rollback(True)
        await send({"type": "http.response.body"})
        await running.write("background")

    await get(serving(running, app))
    assert running.stored() == ["background"]


async def test_set_rollback_of_a_task_outlives_messages_of_another_one(running: Running) -> None:
    """A task of an inner middleware may send the end of a body after the next work has begun."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        set_rollback(True)
        await asyncio.create_task(send({"type": "http.response.body"}))
        await running.write("background")

    await get(serving(running, app))
    assert running.stored() == []


async def test_set_rollback_after_the_request_is_refused(running: Running) -> None:
    """`set_rollback` raises, because there is no unit of work any more."""
    over = asyncio.Event()
    tasks = []

    async def late() -> None:
        await over.wait()
        set_rollback(True)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(asyncio.create_task(late()))
        await respond(send)

    await get(serving(running, app))
    over.set()
    with pytest.raises(SessionClosed):
        await tasks[0]


async def test_set_rollback_during_the_last_commit_is_refused(running: Running) -> None:
    """A listener cannot change the decision any more, and its error rolls back."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        await running.write("background")
        session: Any = running.database.get_session()
        session = getattr(session, "sync_session", session)
        event.listen(session, "before_commit", lambda _: set_rollback(True), once=True)

    exchange = await get(serving(running, app))
    assert isinstance(exchange.error, SessionClosed)
    assert running.stored() == []


@pytest.mark.parametrize("answer", ["raises", "returns no application", "sends no response"])
async def test_an_on_commit_error_that_fails_does_not_hide_the_failed_commit(
    running: Running, answer: str
) -> None:
    """Both errors reach the server; the first one is the cause of the second."""

    def broken(error: Exception) -> Any:
        if answer == "raises":
            raise LookupError
        return {} if answer == "returns no application" else broken_application

    async def broken_application(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.doom()
        await respond(send, 201)

    exchange = await get(serving(running, app, on_commit_error=broken))
    assert exchange.messages == []
    assert isinstance(exchange.error, LookupError | ConfigurationError)
    assert isinstance(exchange.error.__cause__, running.real.refusal)


@pytest.mark.parametrize("answer", [{"detail": "taken"}, ("taken", 409), "coroutine"], ids=str)
async def test_an_on_commit_error_that_returns_no_application_is_told_what_to_return(
    running: Running, answer: Any
) -> None:
    """A result of FastAPI or Flask style would be called, with an error that names no option."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.doom()
        await respond(send, 201)

    def answered(_: Exception) -> Any:
        return nothing({}, None, None) if answer == "coroutine" else answer

    exchange = await get(serving(running, app, on_commit_error=answered))
    assert isinstance(exchange.error, ConfigurationError)
    said = "on_commit_error must return an ASGI application (such as a Starlette Response) or None"
    kind = "coroutine" if answer == "coroutine" else type(answer).__name__
    assert str(exchange.error).startswith(f"{said}, and returned something of type {kind}.")
    assert ("plain function" in str(exchange.error)) == (answer == "coroutine")
    assert isinstance(exchange.error.__cause__, running.real.refusal)


async def test_a_commit_of_the_handlers_own_is_respected(running: Running) -> None:
    """Work that the application committed itself stays stored."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        await running.call("commit")
        await running.write("lost")
        await respond(send, 400)

    await get(serving(running, app))
    assert running.stored() == ["kept"]


@pytest.mark.parametrize("background", [False, True])
async def test_a_session_that_escaped_can_never_check_out_a_connection(
    running: Running, *, background: bool
) -> None:
    """Stored references raise an error that says what to write, for each use of the database."""
    escaped: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        escaped.append(running.database.get_session())
        await respond(send)
        if background:  # otherwise there is nothing to roll back
            await running.write("kept too")

    await get(serving(running, app))
    session = escaped[0]
    uses: list[Callable[[], Any]] = [
        lambda: session.execute(select(ENTRY)),
        lambda: session.scalar(select(ENTRY)),
        lambda: session.get(object, 1),
        lambda: session.flush(),
        lambda: session.commit(),
        lambda: session.connection(),
        lambda: session.begin_nested(),
        lambda: session.add(object()),
    ]
    for use in uses:
        with pytest.raises(SessionClosed, match=r"database\.begin\(\)"):
            result = use()
            if not running.real.is_sync:
                await result
    await running.assert_clean()


async def test_a_task_that_outlives_its_request_gets_a_clear_error(running: Running) -> None:
    """The function call would open the session too late."""
    tasks = []
    over = asyncio.Event()

    async def late() -> None:
        await over.wait()
        running.database.get_session()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(asyncio.create_task(late()))
        await respond(send)

    await get(serving(running, app))
    over.set()
    with pytest.raises(SessionClosed, match=r"database\.begin\(\)"):
        await tasks[0]


async def test_a_body_is_committed_by_its_last_message_whoever_committed_before(
    running: Running,
) -> None:
    """A Starlette `StreamingResponse` runs its body in a separate task."""
    seen = []

    async def stream(send: Any) -> None:
        await running.write("streamed")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("handled")
        await running.call("commit")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.create_task(stream(send))

    def look(message: Message) -> None:
        seen.append((running.stored(), checked_out(running.database)))

    await Exchange(DBSessionMiddleware(app, running.database), on_message=look).run()
    if running.real.is_sync:  # there, the task that opened the session matters
        assert running.stored() == ["handled", "streamed"]
    else:
        assert seen == [(["handled"], 0), (["handled", "streamed"], 0)]


async def test_outside_of_a_request_there_is_no_session(running: Running) -> None:
    """`get_session()` raises an error that says where it works."""
    with pytest.raises(NoSession, match=r"database\.begin\(\)"):
        running.database.get_session()
    with pytest.raises(NoSession, match=r"database\.begin\(\)"):
        set_rollback(True)


async def test_the_default_accessors_take_the_first_database_of_their_kind(real: Real) -> None:
    """One application can have async and sync handlers."""
    first, second = real.describe(), real.describe()
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        mine, other = (
            (get_sync_session, get_session) if real.is_sync else (get_session, get_sync_session)
        )
        seen.append(mine() is first.get_session())
        seen.append(mine() is second.get_session())
        with pytest.raises(ConfigurationError, match=mine.__name__):
            other()
        await respond(send)

    async with first, second:
        await get(DBSessionMiddleware(app, first, second))
    assert seen == [True, False]


async def test_several_databases_are_committed_in_order_and_rolled_back_together(
    running: Running,
) -> None:
    """If a COMMIT fails, the databases after it are rolled back."""
    other = running.real.describe()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.execute(select(ENTRY))
        await running.doom()
        await running.execute(select(ENTRY), other)
        await respond(send)

    async with other:
        exchange = await get(DBSessionMiddleware(app, running.database, other))
        assert isinstance(exchange.error, running.real.refusal)
        assert exchange.messages == []
        await running.real.assert_clean(other)


async def test_a_mounted_application_joins_the_unit_of_work_around_it(running: Running) -> None:
    """The outer middleware manages the database of both, and ends its session."""
    sessions = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sessions.append(running.database.get_session())
        await running.write("lost")
        set_rollback(True)
        await respond(send)

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        sessions.append(running.database.get_session())
        await serving(running, app)(dict(scope), receive, send)
        assert running.database.get_session() is sessions[0]

    await get(serving(running, outer))
    assert sessions[0] is sessions[1]
    assert running.stored() == []


async def test_a_request_made_in_process_from_a_handler_is_a_request_of_its_own(
    running: Running,
) -> None:
    """A task after the request has the context of the request, but no unit of work."""

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await running.write("inner")
        await respond(send)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await get(serving(running, inner))
        await running.write("outer")
        await respond(send, 400)

    await get(serving(running, app))
    assert running.stored() == ["inner"]


async def test_one_scope_can_be_served_twice(running: Running) -> None:
    """A wrapper that runs a request again finds no closed unit of work in the scope."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write("kept")
        if len(attempts) > 1:
            await respond(send)

    attempts: list[int] = []
    middleware = serving(running, app)

    async def twice(scope: Any, receive: Any, send: Any) -> None:
        for number in (1, 2):
            attempts.append(number)
            await middleware(scope, receive, send)

    assert (await get(twice)).status == 200
    assert running.stored() == ["kept"]


async def test_the_scope_is_in_the_info_of_the_session(running: Running) -> None:
    """SQLAlchemy's event listeners can read the scope of their request."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(running.database.get_session().info["scope"] is scope)
        await respond(send)

    await get(serving(running, app))
    assert seen == [True]


async def test_trailers_wait_for_a_commit_too(running: Running) -> None:
    """The trailers of gRPC carry the status of the call."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"x"})
        await running.doom()
        await send({"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]})

    async def receive() -> Any: ...

    async def send(message: Any) -> None:
        sent.append(message["type"].removeprefix("http.response."))

    with pytest.raises(running.real.refusal):
        await DBSessionMiddleware(app, running.database)(Exchange(app).scope, receive, send)
    assert sent == ["start", "body"]
    await running.assert_clean()


@pytest.mark.parametrize("when", ["before the response", "after the response"])
async def test_a_closed_session_keeps_no_scope(running: Running, when: str) -> None:
    """A task that outlives the request may still have the session."""
    sessions = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        opened: Any = running.database.get_session()
        sessions.append(getattr(opened, "sync_session", opened))
        if when == "before the response":
            await running.write("a")
        await respond(send)
        if when == "after the response":
            await running.write("a")

    await get(serving(running, app))
    assert [(each.info["scope"], list(each)) for each in sessions] == [(None, [])]
    assert running.stored() == ["a"]


async def test_other_scopes_pass_untouched() -> None:
    """A WebSocket or an unknown scope reaches the application unchanged."""
    seen = []

    async def app(*call: Any) -> None:
        seen.append(call)

    async def receive() -> Any: ...

    async def send(message: Any) -> None: ...

    scope = {"type": "something"}
    await DBSessionMiddleware(app, "sqlite://")(scope, receive, send)
    assert seen == [(scope, receive, send)]


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application that is never called."""


@pytest.mark.parametrize("given", [None, 1, object(), AsyncDatabase])
def test_what_is_no_database_is_refused(given: Any) -> None:
    """The error says what to give instead."""
    with pytest.raises(ConfigurationError, match="takes a URL, an AsyncDatabase or a Sync"):
        DBSessionMiddleware(nothing, given)


def test_one_database_given_twice_is_refused() -> None:
    """The same database twice would be a mistake."""
    database = SyncDatabase("sqlite://")
    with pytest.raises(ConfigurationError, match="twice"):
        DBSessionMiddleware(nothing, database, database)


@pytest.mark.parametrize("value", [400, nothing])
@pytest.mark.parametrize("option", ["commit_when", "on_commit_error"])
def test_what_is_no_plain_function_is_refused(option: str, value: Any) -> None:
    """The error comes at configuration time; a coroutine would always count as true."""
    wrong: Any = {option: value}
    with pytest.raises(ConfigurationError, match=option):
        DBSessionMiddleware(nothing, "sqlite://", **wrong)


async def test_without_databases_the_environment_says_which(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`DATABASE_URL` is used, with a clear error if it is not set."""
    monkeypatch.setenv("DATABASE_URL", "sqlite:///shop.db")
    (database,) = DBSessionMiddleware(nothing).databases
    assert database.url.render_as_string() == "sqlite+aiosqlite:///shop.db"
    monkeypatch.delenv("DATABASE_URL")
    middleware = DBSessionMiddleware(nothing)
    assert middleware.databases == ()
    exchange = await get(middleware)
    assert isinstance(exchange.error, ConfigurationError)
    assert "DATABASE_URL=sqlite:///shop.db" in str(exchange.error)
