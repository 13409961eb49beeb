"""Commits or rolls back the work of a task before this task uses the WebSocket."""

from contextlib import suppress

from asgi_dbsession.errors import AbortRequest, ConcurrentUse
from asgi_dbsession.session.tasks import current_task
from asgi_dbsession.types import Message, Receive, Send
from asgi_dbsession.unit.ending import end_work_of
from asgi_dbsession.unit.unit_of_work import UnitOfWork

# Before a message of one of these types, which reach the client, work is committed or rolled back.
# (`websocket.http.response.start` denies the handshake with an HTTP response.)
_OBSERVED = (
    "websocket.accept",
    "websocket.send",
    "websocket.close",
    "websocket.http.response.start",
)
# The WebSocket close codes "normal closure" and "going away". Before a close with any other code,
# work is rolled back. Source: https://www.rfc-editor.org/rfc/rfc6455#section-7.4.1
_REGULAR_CLOSE = (1000, 1001)
# The WebSocket close codes for an internal error. If the server does not allow 1011, the code 4500
# is used: the server daphne allows only 1000 and the codes from 3000 on.
_INTERNAL_ERROR = (1011, 4500)


class SocketExchange:
    """Passes on the messages of one WebSocket; commits or rolls back before each message.

    The work of a task is committed before the task sends a message or waits for one. If the message
    denies the handshake, or closes the WebSocket because of an error, the work is rolled back.

    Attributes:
        may_commit: True if the WebSocket was accepted, and was not closed because of an error.
    """

    def __init__(self, unit: UnitOfWork, receive: Receive, send: Send) -> None:
        self.may_commit: bool = False
        # A WebSocket gets no HTTP error response. If COMMIT fails, this middleware raises the error
        # to the server, as it does after the start of an HTTP response.
        unit.is_answered = True
        self._unit = unit
        self._receive = receive
        self._send = send
        # How many tasks are waiting now for a message from the client.
        self._waiting = 0

    async def receive(self) -> Message:
        """Commit the work of the calling task, and then wait for a message from the client.

        So the task holds no database connection while it waits.
        """
        await self._end_work(commit=True)
        self._waiting += 1
        try:
            return await self._receive()
        finally:
            self._waiting -= 1

    async def send(self, message: Message) -> None:
        """Commit or roll back the work of the calling task, and then send the message."""
        kind = message["type"]
        if kind == "websocket.accept":
            self.may_commit = True
        elif kind == "websocket.close":
            is_regular = message.get("code", 1000) in _REGULAR_CLOSE
            self.may_commit = self.may_commit and is_regular
        if kind in _OBSERVED:
            await self._end_work(commit=self.may_commit)
        elif self._unit.failure is not None:
            raise AbortRequest
        await self._send(message)

    async def _end_work(self, *, commit: bool) -> None:
        unit = self._unit
        if unit.failure is not None:
            raise AbortRequest
        if unit.is_used:
            try:
                await end_work_of(current_task(), unit, commit=commit, living="refuse")
            except Exception as error:
                await self._wake_waiting()
                if isinstance(error, ConcurrentUse):
                    raise
                raise AbortRequest from error

    async def _wake_waiting(self) -> None:
        """After a failed commit, close the WebSocket if another task waits for the client.

        Because of the failed commit, a message to the client was not sent. If the client waits for
        this message, and the other task waits for the client, neither would ever go on.
        """
        if self._waiting and self.may_commit:
            for code in _INTERNAL_ERROR:
                # Ignore an error of this close message, because the client may have disconnected.
                # The caller raises the error of the failed commit next, which is more important.
                with suppress(Exception):
                    await self._send({"type": "websocket.close", "code": code})
                    return
