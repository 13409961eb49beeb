"""The lock of a sync session: a thread that waits for this lock is blocked."""

from concurrent.futures import Future
from threading import get_ident

from typing_extensions import override

from .lock import SessionLock, current_end, current_task


class ThreadLock(SessionLock):
    """The lock of a sync session, which counts each thread as one caller.

    A commit or rollback may run in several threads. These threads count as one caller: the `End`
    object of this commit or rollback.

    Args:
        database: The database of the session, for error texts.
        opener: The task that opened the session. Work of worker threads counts as the work of this
            task, because a thread does not know which task started it.
    """

    def __init__(self, database: object, opener: object) -> None:
        super().__init__(database)
        self._opener = opener

    @override
    def _caller(self) -> object:
        return current_end.get() or get_ident()

    @override
    def _add_user(self, task: object) -> None:
        user = current_task() or self._opener
        if user is None:
            self.has_finished_work = True
        else:
            super()._add_user(user)

    @override
    def _wait(self, released: "Future[None]") -> None:
        released.result()
