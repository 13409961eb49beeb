"""The lock of a sync session: a thread that waits for the lock is blocked."""

from concurrent.futures import Future
from threading import get_ident
from time import perf_counter

from typing_extensions import override

from asgi_dbsession.errors import ConcurrentUse

from .end import current_end
from .lock import SessionLock
from .tasks import current_task, is_on_event_loop


class ThreadLock(SessionLock):
    """The lock of a sync session. A thread holds the lock while it uses the session.

    A commit or rollback itself holds the lock, and may use several threads.

    Args:
        opener: The task that has created the session. If a worker thread, which has no task, uses
            the session, `opener` is recorded in `users` (the tasks that have used the session).
    """

    def __init__(self, database: object, opener: object) -> None:
        super().__init__(database)
        self._opener = opener

    @override
    def _caller(self) -> object:
        return current_end.get() or get_ident()

    @override
    def _add_user(self, task: object) -> None:
        super()._add_user(current_task() or self._opener)

    @override
    def _hold(self, caller: object) -> None:
        self._thread, self._held_since = get_ident(), perf_counter()
        self._holder = caller

    @override
    def _is_abandoned(self, thread: int, since: float = 0) -> bool:
        if self._held_for is None:
            # Return True if `thread`, which now waits for a commit or rollback, still holds the
            # lock for an earlier operation. An exception of a signal handler has ended this
            # operation before it released the lock. So the commit or rollback may take the lock.
            return self._thread == thread and self._held_since <= since
        # Return True if a commit or rollback has failed without a release of the lock, and the
        # thread that ran it now asks for the lock. Nobody else would release the lock.
        return self._held_for.failure is not None and self._thread == thread

    @override
    def _wait(self, released: "Future[None]") -> None:
        # On the event loop's thread, raise an error instead of waiting for a commit or rollback
        # that the event loop must still start (`_reserved_for`) or continue (`needs_loop`). The
        # blocked event loop could not do this, and both would wait forever.
        needs_loop = self._reserved_for is not None or any(each.needs_loop for each in self.ends)
        if (needs_loop and is_on_event_loop()) or self._is_abandoned(get_ident()):
            raise ConcurrentUse(self.database)
        released.result()
