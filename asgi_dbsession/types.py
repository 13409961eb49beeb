"""Type aliases that several packages use: those of ASGI, and the type of the option `retry_on`."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

# ASGI scopes and messages are dictionaries. Starlette, httpx and uvicorn declare different types
# for them, which exclude each other. All three libraries accept `Any`.
Scope: TypeAlias = Any
Message: TypeAlias = Any

Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

RetryOn: TypeAlias = (
    type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool] | None
)
