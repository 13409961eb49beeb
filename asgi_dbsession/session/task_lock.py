"""The lock of an async session: while a task waits for the lock, other tasks can run."""

import asyncio
from concurrent.futures import Future
from importlib import import_module
from typing import Any
from weakref import ref

from sqlalchemy.util import await_only
from typing_extensions import override

from asgi_dbsession.errors import ConfigurationError

from .lock import SessionLock

# The package greenlet has no type annotations. With a normal import, mypy would report an error.
_getcurrent: Any = import_module("greenlet").getcurrent


class TaskLock(SessionLock):
    """The lock of an async session. Each asyncio task is one caller of the lock."""

    _greenlet: Any = None

    @override
    def _caller(self) -> object:
        try:
            # The task that asks for the lock is the caller. In a callback of the event loop there
            # is no task. Then the event loop itself counts as the caller.
            return asyncio.current_task() or asyncio.get_running_loop()
        except RuntimeError as error:
            raise ConfigurationError(
                f"This session of {self.database} was used in a thread, where nothing can be "
                "awaited. Use it in an `async def` function, or give DBSessionMiddleware a "
                "SyncDatabase for functions written with `def`."
            ) from error

    @override
    def _wait(self, released: "Future[None]") -> None:
        await_only(asyncio.wrap_future(released))

    @override
    def _hold(self, caller: object) -> None:
        # SQLAlchemy runs each awaited operation in a greenlet of its own. A strong reference to
        # this greenlet would keep the context variables of the request in memory.
        self._greenlet = ref(_getcurrent())
        self._holder = caller

    @override
    def _is_abandoned(self, thread: int, since: float = 0) -> bool:
        greenlet, holder = self._greenlet(), self._holder
        # A commit or rollback runs in one task, but its steps run in several greenlets. So an ended
        # greenlet does not mean that the commit or rollback has ended.
        has_ended = self._held_for is None and (greenlet is None or greenlet.dead)
        return has_ended or (isinstance(holder, asyncio.Future) and holder.done())

    @override
    def _add_user(self, task: object) -> None:
        super()._add_user(task if isinstance(task, asyncio.Future) else None)
