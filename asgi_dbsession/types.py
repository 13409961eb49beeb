"""The ASGI vocabulary."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

# `Any`, because Starlette, httpx and uvicorn describe the same dictionaries in ways that
# exclude each other: this is the one form that all of them accept.
Scope: TypeAlias = Any
Message: TypeAlias = Any

Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
