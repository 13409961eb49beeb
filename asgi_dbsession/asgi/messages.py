"""Before which messages of an exchange its unit of work ends."""

from collections.abc import Callable

from asgi_dbsession.errors import Unwound
from asgi_dbsession.session.lock import current_task
from asgi_dbsession.types import Message, Receive, Send
from asgi_dbsession.unit.unit_of_work import UnitOfWork

# What ends a response, unless it says `more_body`.
_ENDINGS = ("http.response.body", "http.response.pathsend", "http.response.zerocopysend")
# Before what on a socket the work ends; the last is a denial.
_ENDING_WORK = (
    "websocket.accept",
    "websocket.send",
    "websocket.close",
    "websocket.http.response.start",
)
# Normal closure, and going away: https://www.rfc-editor.org/rfc/rfc6455#section-7.4.1
_FINE = (1000, 1001)


async def end_then_send(
    unit: UnitOfWork, commit_when: Callable[[int], bool], send: Send, message: Message
) -> None:
    """Send a message of a response, after COMMIT or ROLLBACK where it would acknowledge the work.

    No closure, for a request that never asks for a session would pay for it too.
    """
    if unit.failure is not None:
        raise Unwound
    kind = message["type"]
    if kind == "http.response.start":
        if unit.sessions or unit.after_commit:
            rollback = unit.rollback
            success = commit_when(message["status"]) if rollback is None else not rollback
            await unit.end(commit=success)
        unit.rollback = None
        unit.is_answered = True
    elif kind in _ENDINGS and not message.get("more_body", False):
        if unit.may_commit or not unit.is_answered:
            await send(message)  # which the server refuses, before a start and after an end
            return
        unit.may_commit = True
        # Below an inner BaseHTTPMiddleware, this may not be the task at work.
        if unit.is_used and (task := current_task()) is not None:
            await unit.end(commit=not unit.rollback, only_of=(task,))
    await send(message)


def end_before_waiting(unit: UnitOfWork, receive: Receive, send: Send) -> tuple[Receive, Send]:
    """Have whatever the peer can observe of a WebSocket wait for COMMIT or ROLLBACK.

    And whatever waits for the peer: so no connection is held meanwhile. It is the work of the
    task that sends or receives which ends, if it alone was at work.
    """
    unit.is_answered = True  # by the handshake, or by the server

    async def end_unit_then_receive() -> Message:
        if unit.failure is not None:
            raise Unwound
        await end_own_work(commit=True)
        return await receive()

    async def end_unit_then_send(message: Message) -> None:
        if unit.failure is not None:
            raise Unwound
        kind = message["type"]
        if kind == "websocket.accept":
            unit.may_commit = True
        elif kind == "websocket.http.response.start":
            unit.may_commit = False
        elif kind == "websocket.close":
            unit.may_commit = unit.may_commit and message.get("code", 1000) in _FINE
        if kind in _ENDING_WORK:
            await end_own_work(commit=unit.may_commit)
        await send(message)

    async def end_own_work(*, commit: bool) -> None:
        if unit.is_used:
            # None: what threads did, and tasks that have ended: the handler waited for them.
            tasks = current_task(), None
            success = commit if unit.rollback is None else not unit.rollback
            await unit.end(commit=success, only_of=tasks)

    return end_unit_then_receive, end_unit_then_send
