"""`AsyncSession` classes whose methods raise an error in a `def` function, which cannot await."""

import asyncio
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import greenlet_spawn
from typing_extensions import Self, override

from asgi_dbsession.errors import ConfigurationError

from .completion import run_to_completion
from .guard import derive

R = TypeVar("R")
A = TypeVar("A", bound=AsyncSession)


def guarded_async_class(session_class: type[A]) -> type[A]:
    """Derive an `AsyncSession` class whose methods raise an error if a `def` function calls them.

    In a `def` function, `session.execute(…)` would only return a coroutine that nobody awaits, and
    the statement would not be sent.
    """
    methods = {
        name: _on_event_loop(method)
        for name, method in inspect.getmembers(session_class, inspect.iscoroutinefunction)
        if not name.startswith("_") and name != "close"
    }
    return derive(session_class, (_ClosingAsyncSession, session_class), methods)


def _on_event_loop(method: Callable[..., R]) -> Callable[..., R]:
    @functools.wraps(method)
    def call_on_event_loop(self: Any, *args: Any, **kwargs: Any) -> R:
        if asyncio._get_running_loop() is None:
            raise ConfigurationError(
                f"`session.{method.__name__}()` of an AsyncSession was called in a `def` function, "
                "where nothing awaits it, and so would do nothing. Write the function with "
                "`async def` and `await` the call, or use a SyncDatabase in it."
            )
        return method(self, *args, **kwargs)

    return call_on_event_loop


class _ClosingAsyncSession(AsyncSession):
    """An `AsyncSession` whose `close()` never hides an exception that the application raised."""

    @override
    async def close(self) -> None:
        if sys.exception() is None:
            await super().close()
        else:
            await _run(self, "close_after_error")

    @override
    async def __aenter__(self) -> Self:
        self.sync_session.__enter__()
        return await super().__aenter__()

    @override
    async def __aexit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if type_ is None:
            await super().__aexit__(type_, value, traceback)
        else:
            await _run(self, "discard")


async def _run(session: AsyncSession, method: str) -> None:
    await run_to_completion(greenlet_spawn(getattr(session.sync_session, method)))
