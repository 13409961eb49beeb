"""Commits or rolls back before an HTTP response starts, and before it ends."""

from asgi_dbsession.errors import AbortRequest
from asgi_dbsession.session.completion import run_to_completion
from asgi_dbsession.session.tasks import current_task
from asgi_dbsession.types import Message, Receive, Send
from asgi_dbsession.unit.current import current_unit
from asgi_dbsession.unit.ending import end_reads, end_work, end_work_of
from asgi_dbsession.unit.unit_of_work import UnitOfWork

from .rules import CommitRule

# The types of messages that can end a response. Such a message ends the response if its `more_body`
# is False. Work is committed before this message is sent.
_LAST = ("http.response.body", "http.response.pathsend", "http.response.zerocopysend")
# The application may still use its session after the last part of the body, before it sends HTTP
# trailers. Commit this later work before the trailers are sent: with gRPC, the trailers tell the
# client whether the call succeeded.
_TRAILERS = "http.response.trailers"


class Exchange:
    """Sends the messages of one response. Commits or rolls back before the first and last message.

    Attributes:
        may_commit: True after the last message of the response. If this is False when the
            application returns, the uncommitted work of the request is rolled back.
    """

    __slots__ = ("_commit_rule", "_send", "_unit", "may_commit", "receive")

    def __init__(
        self, unit: UnitOfWork, receive: Receive, send: Send, commit_rule: CommitRule
    ) -> None:
        self.receive: Receive = receive
        self._unit, self._send, self._commit_rule = unit, send, commit_rule
        self.may_commit: bool = False

    async def send(self, message: Message) -> None:
        """Send a message. Commit or roll back before the first and last message of a response."""
        unit = self._unit
        if unit.failure is not None:
            raise AbortRequest
        kind = message["type"]
        if kind == "http.response.start" and not unit.is_answered:
            # Import `warn_of_early_events` before COMMIT: if the import failed after COMMIT, the
            # client would get an error although the work is stored.
            if _is_event_stream(message):
                from .optional.events import warn_of_early_events

                self._send = warn_of_early_events(unit, self._send)
            if unit.sessions or unit.callbacks or current_unit.get() is not unit:
                try:
                    commit = self._decide(message)
                    if not end_reads(unit, commit=commit):
                        await run_to_completion(end_work(unit, commit=commit))
                except Exception as error:
                    unit.failure = unit.failure or error
                    raise AbortRequest from error
                # During this commit or rollback, another task of the request may have tried to
                # commit too. If the COMMIT of the other task failed, do not send the response.
                if unit.failure is not None:
                    raise AbortRequest
            elif unit.rollback is not None:
                unit.forget_decisions()
            unit.is_answered = True
        elif kind in _LAST and not message.get("more_body", False) and unit.is_answered:
            if unit.is_used and not self.may_commit:
                await self._end_body()
            self.may_commit = True
            # While the last message is sent, uvicorn may start the client's next request in the
            # same context (`contextvars`). That request must not find this unit of work. So set
            # `current_unit` to None meanwhile.
            token = current_unit.set(None)
            try:
                await self._send(message)
            finally:
                current_unit.reset(token)
            return
        elif kind == _TRAILERS and self.may_commit and unit.is_used:
            await self._end_body()
        await self._send(message)

    def _decide(self, message: Message) -> bool:
        innermost = current_unit.get()
        if innermost is not None and innermost is not self._unit:
            from .optional.open_block import refuse_open_block

            refuse_open_block(self._unit, innermost)
        if self._unit.rollback is not None:
            return not self._unit.rollback
        return self._commit_rule(message["status"], self._unit.scope)

    async def _end_body(self) -> None:
        try:
            await end_work_of(current_task(), self._unit, commit=True, living="leave")
        except Exception as error:
            self._unit.failure = self._unit.failure or error
            raise AbortRequest from error


def _is_event_stream(start: Message) -> bool:
    """Return True if a start message begins a response of type `text/event-stream`."""
    headers = start.get("headers")
    # Read the headers only if they are a list. An iterator can be read only once, and the server
    # must read it.
    for name, value in headers if isinstance(headers, list) else ():
        # A response with the header Content-Length is no event stream, because the length of an
        # event stream is not known at its start.
        if name == b"content-length":
            return False
        if name == b"content-type":
            return bool(value.startswith(b"text/event-stream"))
    return False
