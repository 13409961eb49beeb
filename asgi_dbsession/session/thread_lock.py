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

    A commit or rollback may use several threads, one after the other. So no thread holds the lock
    then: the commit or rollback itself holds it, and all of these threads may use the session.

    Args:
        database: The database of the session, for error texts.
        opener: The task that opened the session. If a worker thread uses the session, the lock
            records this task as the user, because a thread does not know which task started it.
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
            # At the time `since`, `thread` has asked for a commit or rollback. So its earlier
            # operations are over and must have released the lock. If one of them still holds the
            # lock, a signal handler (for Ctrl-C) has interrupted it, and nobody will release the
            # lock. If an operation got the lock after `since`, another task runs it.
            return self._thread == thread and self._held_since <= since
        # A commit or rollback may run its steps in several threads. After a failure, one of the
        # steps may still run and hold the lock. But a thread does one thing at a time. So if the
        # thread of this step now asks for the lock, the step has ended without releasing the lock.
        # Nobody else will release it: the lock is abandoned.
        return self._held_for.failure is not None and self._thread == thread

    @override
    def _wait(self, released: "Future[None]") -> None:
        # Do not block the thread of the event loop while a commit or rollback needs the event loop:
        # both would wait for ever. A commit or rollback that has not started yet (`_reserved_for`)
        # needs the event loop to start. Some commits of several databases need the event loop
        # between their steps (`needs_loop`).
        needs_loop = self._reserved_for is not None or any(each.needs_loop for each in self.ends)
        if (needs_loop and is_on_event_loop()) or self._is_abandoned(get_ident()):
            raise ConcurrentUse(self.database)
        released.result()
