"""One attempt to serve a request. Its error response is not sent if the request is retried."""

from http import HTTPStatus

from typing_extensions import override

from asgi_dbsession.types import ASGIApp, Message, Receive, Scope, Send
from asgi_dbsession.unit.attempt import running_attempt

from .replay import Replay
from .watched import WatchedAttempt
from .withholding import Withholding


class RequestAttempt(Withholding):
    """One attempt to serve a request, after which the request may be retried.

    Args:
        body: The body of the request, which is stored for the next attempt.
        watched: The object that records conflicts and COMMITs during this attempt.
    """

    def __init__(self, body: Replay, watched: WatchedAttempt) -> None:
        super().__init__()
        self._body = body
        self.watched: WatchedAttempt = watched
        watched.stored = body.let_go

    @property
    def can_retry(self) -> bool:
        """True if a conflict with another transaction has occurred, and the request can be retried.

        A retry is possible only if nothing was committed, and nothing was sent to the client. The
        body of the request must also be stored, because the retry reads the body again.
        """
        return self._body.is_kept and not self.is_answered and self.watched.can_retry

    @property
    def owes_answer(self) -> bool:
        """True if an error response was held back, and the client still waits for a response."""
        return self.is_withheld and not self._body.is_client_gone

    @override
    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_forget(message: Message) -> None:
            self.watched.make_final()
            self._body.let_go()
            await send(message)

        token = running_attempt.set(self.watched)
        try:
            await super().serve(app, scope, receive, send_and_forget)
        finally:
            running_attempt.reset(token)

    @override
    def withholds_message(self, message: Message) -> bool:
        # A success status means that the application has handled a conflict itself. Any other
        # response may report the conflict, so hold it back if a retry is possible.
        if _is_success(message):
            return False
        self.watched.record_handled_error()
        return self.can_retry

    @override
    def withholds_error(self, error: BaseException) -> bool:
        self.watched.record_error(error)
        return self.can_retry


def _is_success(message: Message) -> bool:
    is_start: bool = message["type"] == "http.response.start"
    return is_start and message["status"] < HTTPStatus.BAD_REQUEST
