"""The body of a request, kept to be received again."""

from asgi_dbsession.types import Message, Receive

# How much of a request's body is kept for another run, in bytes. One with more runs only once.
BODY_LIMIT = 1_048_576


class Replay:
    """What the client sends, for each attempt from the start.

    Attributes:
        is_kept: Whether all that was received is still there, and the client too.
        is_client_gone: Whether it is the client that is not.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._body = bytearray()  # in one piece, for small ones would take far more than they hold
        self._has_begun = False
        self._has_more = True
        self.is_kept: bool = True
        self.is_client_gone: bool = False

    def from_start(self, *, last: bool = False) -> Receive:
        """A `receive` that begins with all of the body that was received so far.

        Args:
            last: Whether there will be no other run, so that nothing needs to be kept.
        """
        pending = self._body if self._has_begun else None
        has_more = self._has_more
        if last:
            self.let_go()

        async def receive_again() -> Message:
            nonlocal pending
            if pending is not None:
                body, pending = bytes(pending), None
                return {"type": "http.request", "body": body, "more_body": has_more}
            message = await self._receive()
            self._keep(message)
            return message

        return receive_again

    def let_go(self) -> None:
        """Keep nothing any more, because there will be no other run."""
        self.is_kept = False
        self._body = bytearray()

    def _keep(self, message: Message) -> None:
        body = message.get("body", b"")
        self.is_client_gone = self.is_client_gone or message["type"] != "http.request"
        if self.is_client_gone or len(self._body) + len(body) > BODY_LIMIT:
            self.let_go()
        if self.is_kept:
            self._has_begun = True
            self._has_more = message.get("more_body", False)
            self._body += body
