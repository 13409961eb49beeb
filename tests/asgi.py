"""A strict in-process ASGI server for tests; it refuses everything that a real server refuses."""

import asyncio
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


class Exchange:
    """One HTTP request to an application, in process, and all that came back.

    Args:
        app: The ASGI application.
        path: What is asked for.
        method: How.
        content: The body of the request, as JSON.
        spec_version: The ASGI version advertised; uvicorn says 2.3.
        on_message: Called with each message when it arrives, before it counts as received.
    """

    def __init__(
        self,
        app: Any,
        path: str = "/",
        *,
        method: str = "GET",
        content: bytes = b"",
        spec_version: str = "2.3",
        on_message: Callable[[Message], None] | None = None,
    ) -> None:
        self.app = app
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"host", b"test"),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(content)).encode()),
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.messages: list[Message] = []
        self.error: BaseException | None = None
        self.hang_up = asyncio.Event()
        self._content = content
        self._on_message = on_message
        self._asked = False

    async def run(self) -> "Exchange":
        """Serve the request; keep an exception that reaches the server as `error`."""
        try:
            await self.app(self.scope, self._receive, self._send)
        except Exception as error:
            self.error = error
        return self

    @property
    def kinds(self) -> list[str]:
        """The types of the messages, without their prefix."""
        return [message["type"].removeprefix("http.") for message in self.messages]

    @property
    def status(self) -> int | None:
        """The status sent, if a response was started."""
        starts = [each for each in self.messages if each["type"] == "http.response.start"]
        return starts[0]["status"] if starts else None

    @property
    def body(self) -> bytes:
        """The body received so far."""
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def complete(self) -> bool:
        """True if the response has ended."""
        # Nothing may follow the end, so only the last message can be the end.
        last = self.messages[-1] if self.messages else {"type": None}
        return last["type"] == "http.response.body" and not last.get("more_body", False)

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._content, "more_body": False}
        await self.hang_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start" and self.status is not None:
            raise AssertionError("a second response was started")
        if kind == "http.response.body" and self.status is None:
            raise AssertionError("a body came before the start")
        if self.complete:
            raise AssertionError(f"{kind} came after the end")
        if self._on_message is not None:
            self._on_message(message)
        self.messages.append(message)
        if self.complete:
            self.hang_up.set()  # as on a real server, the application gets `http.disconnect`
        await asyncio.sleep(0)


class Life:
    """One lifespan of an application, by a server that refuses what the specification forbids.

    Args:
        app: The ASGI application.
        on_message: Called with each message when it arrives, before it counts as received.
    """

    def __init__(self, app: Any, on_message: Callable[[Any], None] = lambda _: None) -> None:
        self.messages: list[Any] = []
        self.scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}}
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._on_message = on_message
        self._phase = ""
        self._answered = asyncio.Event()
        self.task = asyncio.create_task(app(self.scope, self._inbox.get, self._send))
        self.task.add_done_callback(lambda _: self._answered.set())

    async def startup(self) -> "Life":
        """Send the startup, and wait for an answer."""
        await self._tell("startup")
        return self

    async def shutdown(self) -> "Life":
        """Send the shutdown, and wait until the application has returned."""
        await self._tell("shutdown")
        await asyncio.wait([self.task])
        return self

    async def run(self) -> "Life":
        """Send the startup and the shutdown, whatever the application answers."""
        await self.startup()
        return await self.shutdown()

    @property
    def error(self) -> BaseException | None:
        """What the application raised to the server."""
        return self.task.exception()

    async def _tell(self, phase: str) -> None:
        self._phase = phase
        self._answered.clear()
        if not self.task.done():
            await self._inbox.put({"type": f"lifespan.{phase}"})
            await self._answered.wait()

    async def _send(self, message: Any) -> None:
        phase, outcome = message["type"].removeprefix("lifespan.").split(".")
        assert outcome in ("complete", "failed")
        assert phase == self._phase, f"{message} is no answer to {self._phase}"
        assert not self._answered.is_set(), f"{message} is a second answer"
        self._on_message(message)
        self.messages.append(message)
        self._answered.set()
        await asyncio.sleep(0)


class Socket:
    """One WebSocket to an application, in process, and all that came back.

    Args:
        app: The ASGI application.
        path: What is connected to.
        on_message: Called with each message when it arrives, before it counts as received.
    """

    def __init__(
        self, app: Any, path: str = "/", *, on_message: Callable[[Message], None] | None = None
    ) -> None:
        self.app = app
        self.scope: dict[str, Any] = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "ws",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"test")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "subprotocols": [],
            "extensions": {"websocket.http.response": {}},
        }
        self.messages: list[Message] = []
        self.error: BaseException | None = None
        self.waits = asyncio.Event()
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._inbox.put_nowait({"type": "websocket.connect"})
        self._on_message = on_message

    def say(self, text: str) -> None:
        """Send a message to the application."""
        self.waits.clear()
        self._inbox.put_nowait({"type": "websocket.receive", "text": text})

    def hang_up(self, code: int = 1006) -> None:
        """Disconnect the client with this close code."""
        self.waits.clear()
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": code})

    async def run(self) -> "Socket":
        """Serve the WebSocket; keep an exception that reaches the server as `error`."""
        try:
            await self.app(self.scope, self._receive, self._send)
        except Exception as error:
            self.error = error
        return self

    @property
    def heard(self) -> list[str]:
        """What the application sent, as text."""
        return [each["text"] for each in self.messages if each["type"] == "websocket.send"]

    async def _receive(self) -> Message:
        if self._inbox.empty():
            self.waits.set()
        return await self._inbox.get()

    async def _send(self, message: Message) -> None:
        kind = message["type"].removeprefix("websocket.")
        before = [each["type"].removeprefix("websocket.") for each in self.messages]
        if "close" in before:
            raise AssertionError(f"{kind} came after the close")
        if kind == "send" and "accept" not in before:
            raise AssertionError("a message came before the socket was accepted")
        if kind in ("accept", "http.response.start") and before:
            raise AssertionError(f"{kind} came after {before}")
        if self._on_message is not None:
            self._on_message(message)
        self.messages.append(message)
        await asyncio.sleep(0)


async def get(app: Any, path: str = "/", **options: Any) -> Exchange:
    """Send a request to an application, and wait until the application has returned."""
    return await Exchange(app, path, **options).run()


async def respond(send: Any, status: int = 200, body: bytes = b"ok") -> None:
    """Send a response, as a framework would."""
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})
