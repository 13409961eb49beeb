"""The hand-written application, with a middleware that Starlette runs in tasks.

What `@app.middleware("http")` adds runs the rest of the application in a task of its own.
"""

from typing import Any

from .by_hand import app, pool

__all__ = ["app", "pool"]


@app.middleware("http")
async def pass_on(request: Any, call_next: Any) -> Any:
    return await call_next(request)
