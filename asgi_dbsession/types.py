"""Type aliases for ASGI applications: scope, message, receive, send and the application itself."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

# Scope and Message are `Any`, because Starlette, httpx and uvicorn describe the same dictionaries
# with types that exclude each other. All three libraries accept `Any`.
Scope: TypeAlias = Any
Message: TypeAlias = Any

Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
