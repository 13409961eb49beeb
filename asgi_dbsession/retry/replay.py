"""Stores the body of a request, so that each attempt can receive the whole body."""

from threading import Lock

from asgi_dbsession.types import Message, Receive

# The largest body that is stored for a retry, in bytes. A request with a larger body is not
# retried.
BODY_LIMIT = 1_048_576
# How many bytes one middleware may store for the bodies of all requests together. If the body of a
# request does not fit any more, this request is not retried.
MEMORY_LIMIT = 32 * BODY_LIMIT


class Memory:
    """The memory that the stored bodies of all requests of one middleware may use.

    Attributes:
        free: How many bytes are still free for further bodies.
        mutex: A lock for `free`, because several threads change it: a COMMIT in another thread may
            free the memory of a body.
    """

    def __init__(self) -> None:
        self.free: int = MEMORY_LIMIT
        self.mutex: Lock = Lock()


class Replay:
    """The body of one request, stored so that each retry can read it from the beginning.

    Attributes:
        is_kept: True if the whole body so far is stored, and the client is connected.
        is_client_gone: True if the client has disconnected.
    """

    def __init__(self, receive: Receive, memory: Memory) -> None:
        self._receive = receive
        self._memory = memory
        # The body is one buffer. A list of many small parts would need much more memory.
        self._body = bytearray()
        self._has_begun = False
        self._has_more = True
        # Each attempt (run of the request) is marked by an `object()`. This is the marker of an
        # attempt that has not read the stored body yet: its next `receive` call gets this body.
        # None if the next `receive` call must get a message from the server instead.
        self._pending: object = None
        self.is_kept: bool = True
        self.is_client_gone: bool = False

    def from_start(self, *, last: bool = False) -> Receive:
        """Return a `receive` function that first returns the part of the body that is stored.

        Args:
            last: True if no retry can follow, so that the body need not stay in memory.
        """
        attempt = object()
        self._pending = attempt if self._has_begun else None
        if last:
            self.let_go()

        async def receive_again() -> Message:
            if self._pending is attempt:
                body, self._pending = bytes(self._body), None
                if not self.is_kept:
                    self._release()
                return {"type": "http.request", "body": body, "more_body": self._has_more}
            message = await self._receive()
            self._keep(message)
            return message

        return receive_again

    def let_go(self) -> None:
        """Free the stored body, and store no more of it, because no further retry can follow.

        If the running attempt has not received the stored body yet, the memory is freed later: when
        this attempt receives the body.
        """
        self.is_kept = False
        if self._pending is None:
            self._release()

    def close(self) -> None:
        """Free the stored request body. No retry can follow, because the request has ended."""
        self._pending = None
        self.let_go()

    def _keep(self, message: Message) -> None:
        body = message.get("body", b"")
        self.is_client_gone = self.is_client_gone or message["type"] != "http.request"
        with self._memory.mutex:
            is_short = len(self._body) + len(body) <= BODY_LIMIT and len(body) <= self._memory.free
            if is_short and self.is_kept and not self.is_client_gone:
                self._has_begun = True
                self._has_more = message.get("more_body", False)
                self._body += body
                self._memory.free -= len(body)
                return
        self.let_go()

    def _release(self) -> None:
        if self._body:
            with self._memory.mutex:
                self._memory.free += len(self._body)
                self._body = bytearray()
