"""Runs a request again that lost a race with another one in the database."""

import random
from typing import Any

import anyio
from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext

from .errors import UNWOUND, Unwound
from .types import ASGIApp, Message, Receive, Scope, Send
from .unit_of_work import UnitOfWork, current_unit

# How much of a request's body is kept for another run, in bytes; one with more has a single run.
BODY_LIMIT = 1_048_576

# Transaction rollback (40), but for 40003, which leaves open whether COMMIT came through.
# Source: https://www.postgresql.org/docs/current/errcodes-appendix.html
_ROLLBACK, _UNKNOWN = "40", "40003"
# Deadlock, lock wait timeout, and a record that changed since it was read.
# Source: https://mariadb.com/kb/en/mariadb-error-code-reference/
_MYSQL = (1213, 1205, 1020)
# Its extensions are in the higher bits: https://www.sqlite.org/rescode.html
_SQLITE_BUSY = 5

_KEY = "asgi_dbsession.attempt"


class Attempt:
    """One run of a request.

    Args:
        body: The request's messages.
        is_last: Whether there is no other.

    Attributes:
        unit: The unit of work in which it lost a race, as soon as the database reported one.
        is_answered: Whether the client was sent anything.
    """

    def __init__(self, body: "_Replay", *, is_last: bool) -> None:
        self._body = body
        self._is_last = is_last
        self.unit: UnitOfWork | None = None
        self.is_answered: bool = False

    @property
    def is_futile(self) -> bool:
        """Whether it can be followed by another one as if it had never been."""
        if self.unit is None or self._is_last or self.is_answered:
            return False
        return self._body.is_kept and not self.unit.has_committed


async def serve_until_won(
    serve: ASGIApp, attempts: int, scope: Scope, receive: Receive, send: Send
) -> None:
    """Serve a request up to `attempts` times, each from the top with a scope of its own."""
    body = _Replay(receive)
    for number in range(1, attempts + 1):
        attempt = Attempt(body, is_last=number == attempts)
        try:
            await serve(_copy(scope, attempt), body.from_start(), _unless_futile(attempt, send))
        except UNWOUND:
            if not attempt.is_futile:
                raise
        if not attempt.is_futile:
            return
        # The others that lost the same race try again too: not all at once.
        await anyio.sleep(random.uniform(0, 0.02 * 2**number))  # noqa: S311


def watch_races(engine: Engine) -> None:
    """Have an attempt hear of a lost race, also where its application swallows the error."""
    event.listen(engine, "handle_error", _note_race)


def _note_race(context: ExceptionContext) -> None:
    unit = current_unit.get()
    if unit is None or not _is_lost_race(context.original_exception):
        return
    while unit is not None:
        attempt: Attempt | None = unit.scope.get(_KEY) if unit.scope is not None else None
        if attempt is not None:
            attempt.unit = unit
        unit = unit.enclosing


def _is_lost_race(error: Any) -> bool:
    state = getattr(error, "sqlstate", None)
    if isinstance(state, str):
        return state.startswith(_ROLLBACK) and state != _UNKNOWN
    sqlite_code = getattr(error, "sqlite_errorcode", None)
    if isinstance(sqlite_code, int):
        return sqlite_code & 0xFF == _SQLITE_BUSY
    return bool(error.args) and error.args[0] in _MYSQL


def _copy(scope: Scope, attempt: Attempt) -> Scope:
    fresh = {**scope, _KEY: attempt}
    if "state" in scope:  # what the application keeps of a request, beside its lifespan's state
        fresh["state"] = dict(scope["state"])
    return fresh


def _unless_futile(attempt: Attempt, send: Send) -> Send:
    async def send_unless_futile(message: Message) -> None:
        if attempt.is_futile:  # whatever its framework made of the error
            raise Unwound
        attempt.is_answered = True
        await send(message)

    return send_unless_futile


class _Replay:
    """The messages of a request, kept to be received again.

    Attributes:
        is_kept: Whether all that was received is still there.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []
        self._size = 0
        self.is_kept: bool = True

    def from_start(self) -> Receive:
        """A `receive` that begins with the first message."""
        position = 0

        async def receive_again() -> Message:
            nonlocal position
            if position < len(self._messages):
                position += 1
                return self._messages[position - 1]
            message = await self._receive()
            self._keep(message)
            position = len(self._messages)
            return message

        return receive_again

    def _keep(self, message: Message) -> None:
        self._size += len(message.get("body", b""))
        if message["type"] != "http.request" or self._size > BODY_LIMIT:
            # The client is gone, or too much was sent: there will be no other run.
            self.is_kept = False
            self._messages.clear()
        if self.is_kept:
            self._messages.append(message)
