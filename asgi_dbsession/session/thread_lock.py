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
        opener: The task that counts as the user if a worker thread uses the session.
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
            # If an operation of `thread` still holds the lock after `thread` has asked for a commit
            # or rollback (at the time `since`), a signal handler interrupted the operation.
            return self._thread == thread and self._held_since <= since
        # A step of a failed commit or rollback holds the lock. If the thread of this step now asks
        # for the lock, the step has ended without a release.
        return self._held_for.failure is not None and self._thread == thread

    @override
    def _wait(self, released: "Future[None]") -> None:
        # Do not block the event loop's thread for a commit or rollback that needs the event loop,
        # to start (`_reserved_for`) or between its steps (`needs_loop`).
        needs_loop = self._reserved_for is not None or any(each.needs_loop for each in self.ends)
        if (needs_loop and is_on_event_loop()) or self._is_abandoned(get_ident()):
            raise ConcurrentUse(self.database)
        released.result()
