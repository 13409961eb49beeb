"""Keeps the body of a request, so that each attempt receives the whole body."""

from asgi_dbsession.types import Message, Receive

# The largest body to keep for another attempt, in bytes. A request with a larger body runs once.
BODY_LIMIT = 1_048_576


class Replay:
    """The messages of the client, received from the start in each attempt.

    Attributes:
        is_kept: True if the whole body so far is kept, and the client is still connected.
        is_client_gone: True if the client has disconnected.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        # One buffer for the whole body: a list of many small chunks would need much more memory.
        self._body = bytearray()
        self._has_begun = False
        self._has_more = True
        self.is_kept: bool = True
        self.is_client_gone: bool = False

    def from_start(self, *, last: bool = False) -> Receive:
        """Return a `receive` function that first returns all of the body so far.

        Args:
            last: True if no other attempt follows, so that nothing needs to be kept.
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
        """Free the kept body, because no other attempt follows."""
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
