"""Tests `retry_on`, and what handlers, reports and the log know about each attempt."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Exchange, Socket, get, respond
from conftest import ENTRY, WITH_MARIADB, Running, real_database
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from several import engine_of, in_session
from sqlalchemy import event, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm.exc import StaleDataError
from test_retry import lose

from asgi_dbsession import (
    Attempt,
    ConfigurationError,
    DBSessionMiddleware,
    UnitReport,
    current_attempt,
    set_rollback,
)

pytestmark = pytest.mark.anyio

KINDS = ("asyncpg", "psycopg-sync", "asyncmy")
LOGGER = "asgi_dbsession"


class Conflict(Exception):
    """The exception of an application."""


def is_conflict(error: Exception) -> bool:
    """Return True for errors that the application counts as a conflict."""
    return "conflict" in str(error)


@pytest.fixture
async def postgresql(tmp_path: Path) -> AsyncIterator[Running]:
    """Tests without a relation to a kind of database use one kind."""
    real = real_database("asyncpg", tmp_path)
    async with real.describe() as database:
        yield Running(real, database)
        await real.assert_clean(database)
    real.reader.dispose()


def ours(app: Any, running: Running, **options: Any) -> DBSessionMiddleware:
    return DBSessionMiddleware(app, running.database, **{"attempts": 3, **options})


class Failing:
    """A handler that writes a row, and then raises in its first attempts.

    Args:
        running: Where.
        error: What it raises.
        failures: How often.
    """

    def __init__(self, running: Running, error: Exception, failures: int = 1) -> None:
        self.running = running
        self.error = error
        self.failures = failures
        self.attempts: list[Attempt] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.attempts.append(current_attempt())
        await self.running.write("kept")
        if len(self.attempts) <= self.failures:
            raise self.error
        await respond(send)

    async def answered(self, scope: Any, receive: Any, send: Any) -> None:
        """The handler in a framework that answers every error itself."""
        try:
            await self(scope, receive, send)
        except Exception:
            await respond(send, 409)


# Which errors count


@pytest.mark.parametrize("kept", ["raised", "answered"])
@pytest.mark.parametrize(
    "retry_on", [Conflict, (KeyError, Conflict), is_conflict], ids=["class", "tuple", "predicate"]
)
async def test_an_error_of_the_applications_own_is_retried(
    running: Running, retry_on: Any, kept: str
) -> None:
    """The error is raised to the middleware, or the framework answers it."""
    failing = Failing(running, Conflict("a conflict"))
    app = failing if kept == "raised" else failing.answered
    exchange = await get(ours(app, running, retry_on=retry_on))
    assert (exchange.status, exchange.error) == (200, None)
    assert running.stored() == ["kept"]
    assert failing.attempts == [Attempt(1, 2), Attempt(2, 1)]


async def test_other_errors_are_not_retried(postgresql: Running) -> None:
    """Only errors of the rule and conflicts of the database are retried."""
    failing = Failing(postgresql, ValueError("something else"))
    exchange = await get(ours(failing, postgresql, retry_on=Conflict))
    assert isinstance(exchange.error, ValueError)
    assert len(failing.attempts) == 1


async def test_the_cause_of_an_error_counts(postgresql: Running) -> None:
    """Libraries wrap the exceptions that they catch."""
    wrapped = RuntimeError("in a library")
    wrapped.__cause__ = Conflict()
    failing = Failing(postgresql, ExceptionGroup("tasks", [wrapped]))
    assert (await get(ours(failing, postgresql, retry_on=Conflict))).status == 200


async def test_a_commit_whose_answer_was_lost_is_not_retried(running: Running) -> None:
    """The work may be stored, and a retry would store it a second time."""
    runs: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(1)
        await running.write("perhaps stored")
        await respond(send)

    @event.listens_for(engine_of(running), "commit", once=True)
    def lose_connection(_: object) -> None:
        running.real.kill()

    exchange = await get(ours(app, running, retry_on=(DBAPIError, OSError)))
    assert exchange.messages == []
    assert isinstance(exchange.error, DBAPIError | OSError)
    assert len(runs) == 1


async def test_the_built_in_conflicts_count_as_well(running: Running) -> None:
    """`retry_on` adds errors to the conflicts of the database, and replaces none."""
    runs: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(1)
        if len(runs) == 1:
            await lose(running)
        await respond(send)

    assert (await get(ours(app, running, retry_on=Conflict))).status == 200
    assert len(runs) == 2


@pytest.mark.parametrize("status", [200, 404])
async def test_an_error_that_the_handler_dealt_with_is_not_retried(
    postgresql: Running, status: int
) -> None:
    """A success response is sent, and so is a response after the `except` block has ended."""
    failing = Failing(postgresql, Conflict())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await failing(scope, receive, send)
        except Conflict:
            set_rollback(True)
        await respond(send, status)

    assert (await get(ours(app, postgresql, retry_on=Conflict))).status == status
    assert len(failing.attempts) == 1


async def test_the_last_attempt_is_answered_as_it_is(postgresql: Running) -> None:
    """The exception handler of the framework answers after the last attempt."""
    app = FastAPI()
    attempts: list[Attempt] = []
    app.add_middleware(
        DBSessionMiddleware, postgresql.database, attempts=3, retry_on=(Conflict, IntegrityError)
    )

    @app.exception_handler(Conflict)
    def answer(request: Request, error: Conflict) -> JSONResponse:
        return JSONResponse("a conflict", 409)

    @app.get("/")
    async def handler() -> None:
        attempts.append(current_attempt())
        await postgresql.write("lost")
        raise Conflict

    exchange = await get(app)
    assert (exchange.status, exchange.body) == (409, b'"a conflict"')
    assert attempts == [Attempt(1, 2), Attempt(2, 1), Attempt(3, 0)]
    assert postgresql.stored() == []


async def test_a_stale_version_at_the_flush_is_retried(postgresql: Running) -> None:
    """SQLAlchemy itself raises `StaleDataError`, also in the flush before COMMIT."""
    runs: list[int] = []

    def go_stale(session: Any) -> None:
        @event.listens_for(session, "before_commit")
        def refuse(_: Any) -> None:
            raise StaleDataError("another version")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(1)
        await postgresql.write("kept")
        if len(runs) == 1:
            await in_session(postgresql, go_stale)
        await respond(send)

    exchange = await get(ours(app, postgresql, retry_on=StaleDataError))
    assert (exchange.status, len(runs), postgresql.stored()) == (200, 2, ["kept"])


@pytest.mark.parametrize("real", WITH_MARIADB, indirect=True)
async def test_a_get_or_create_that_50_clients_race_ends_with_one_row(running: Running) -> None:
    """All requests succeed: after a conflict, the retry finds the row of the other request."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        query = select(ENTRY.c.id).where(ENTRY.c.note == "shared")
        found = (await running.execute(query)).scalar()
        if found is None:
            await running.write("shared")
        await respond(send)

    middleware = ours(app, running, attempts=10, retry_on=IntegrityError)
    exchanges = await asyncio.gather(*(get(middleware) for _ in range(50)))
    assert {(each.status, each.error) for each in exchanges} == {(200, None)}
    assert running.stored() == ["shared"]


# What the handler, the reports and the log show


async def test_code_outside_of_retries_is_in_the_first_and_last_attempt(
    postgresql: Running,
) -> None:
    """A script, a WebSocket, and a request without `attempts`."""
    seen: list[Attempt] = [current_attempt()]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current_attempt())
        if scope["type"] == "http":
            await respond(send)

    await get(DBSessionMiddleware(app, postgresql.database))
    await Socket(ours(app, postgresql)).run()
    assert seen == [Attempt(1, 0)] * 3


@pytest.mark.parametrize("kept", ["raised", "answered"])
async def test_reports_tell_an_attempt_that_is_repeated_from_the_final_one(
    running: Running, kept: str
) -> None:
    """A count of failures counts only failures that a client received."""
    reports: list[UnitReport] = []
    failing = Failing(running, Conflict(), failures=2)
    app = failing if kept == "raised" else failing.answered
    await get(ours(app, running, retry_on=Conflict, on_report=reports.append))
    told = [(each.attempt, each.outcome, each.will_retry) for each in reports]
    assert told == [(1, "rolled_back", True), (2, "rolled_back", True), (3, "committed", False)]


async def test_the_report_of_a_lost_last_attempt_says_that_it_was_the_last(
    running: Running,
) -> None:
    """A failed attempt that cannot be retried has the same flag."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/committed":
            await running.write("stored")
            await running.call("commit")
        await lose(running)

    middleware = ours(app, running, attempts=2, on_report=reports.append)
    await get(middleware)
    assert [(each.attempt, each.will_retry) for each in reports] == [(1, True), (2, False)]
    reports.clear()
    await get(middleware, "/committed")
    assert [(each.attempt, each.will_retry) for each in reports] == [(1, False)]


async def test_each_retry_is_one_line_in_the_log(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Text of the client is escaped; the first attempt is not logged."""
    runs: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        runs.append(1)
        if len(runs) <= 2:
            await lose(running)
        await respond(send)

    with caplog.at_level(logging.INFO, LOGGER):
        await Exchange(ours(app, running), "/böse\nForged line", method="POST").run()
    lines = [each.getMessage() for each in caplog.records if each.name == LOGGER]
    assert len(lines) == 2
    for number, line in enumerate(lines, 2):
        assert line.startswith(
            rf"Attempt {number} of 3 of 'POST /b\xf6se\nForged line' begins after a pause of "
        )
        assert line.count("\n") == 0
        assert "lost" in line


async def test_parameters_that_are_hidden_stay_hidden(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL shows values of a row; `hide_parameters` shows only the class of the error."""
    real = real_database("psycopg", tmp_path)
    async with real.describe(hide_parameters=True) as database:
        running = Running(real, database)
        runs: list[int] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            runs.append(1)
            await running.write("secret")
            if len(runs) == 1:
                await running.write("secret")
            await respond(send)

        with caplog.at_level(logging.INFO, LOGGER):
            await get(ours(app, running, retry_on=IntegrityError))
    (line,) = [each.getMessage() for each in caplog.records if each.name == LOGGER]
    assert line.endswith("because of this error: 'UniqueViolation'")
    real.reader.dispose()


# Refused values


async def coroutine_function(error: Exception) -> bool:
    return True


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"retry_on": "Conflict"}, "a class of exceptions, a tuple"),
        ({"retry_on": BaseException}, "not the class BaseException"),
        ({"retry_on": (Conflict, 1)}, "a tuple of such classes"),
        ({"retry_on": coroutine_function}, "Write it with `def`"),
        ({"retry_on": lambda: True}, r"Write `def retry_on\(error\)`"),
        ({"retry_on": Conflict, "attempts": 1}, "Set `attempts` to 2 or more"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_at_once(options: Any, cure: str) -> None:
    """The error is raised when the middleware is made, not at the first conflict."""
    with pytest.raises(ConfigurationError, match=cure):
        DBSessionMiddleware(lambda *_: respond(None), "sqlite://", **{"attempts": 3, **options})


async def test_a_rule_that_says_neither_yes_nor_no_is_an_error(postgresql: Running) -> None:
    """A function without `return` would retry nothing, without a warning."""
    failing = Failing(postgresql, Conflict())
    exchange = await get(ours(failing, postgresql, retry_on=print))
    assert isinstance(exchange.error, ConfigurationError)
    assert "retry_on must return True or False" in str(exchange.error)


async def test_a_function_that_fails_never_makes_stored_work_fail(postgresql: Running) -> None:
    """The handler has caught an error, for which `retry_on` of the application was not written."""
    reports: list[UnitReport] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await postgresql.write("kept")
        try:
            raise KeyError
        except KeyError:
            await respond(send, 201)

    def is_deadlock(error: Any) -> bool:
        return "deadlock" in str(error.orig)

    serving = ours(app, postgresql, retry_on=is_deadlock, on_report=reports.append)
    exchange = await get(serving)
    assert (exchange.status, exchange.error) == (201, None)
    assert postgresql.stored() == ["kept"]
    assert [(each.outcome, each.will_retry) for each in reports] == [("committed", False)]
