"""The lock of an async session: while a task waits for the lock, other tasks can run."""

import asyncio
from concurrent.futures import Future

from sqlalchemy.util import await_only
from typing_extensions import override

from asgi_dbsession.errors import ConfigurationError

from .lock import SessionLock


class TaskLock(SessionLock):
    """The lock of an async session. Each asyncio task is one caller of the lock."""

    @override
    def _caller(self) -> object:
        try:
            return asyncio.current_task()
        except RuntimeError as error:
            raise ConfigurationError(
                f"This session of {self.database} was used in a thread, where nothing can be "
                "awaited. Use it in an `async def` function, or give DBSessionMiddleware a "
                "SyncDatabase for functions written with `def`."
            ) from error

    @override
    def _wait(self, released: "Future[None]") -> None:
        await_only(asyncio.wrap_future(released))
