"""One operation at a time on a session, and none after its end."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future

from sqlalchemy.util import await_only

from .errors import ConcurrentUse, SessionClosed


class Turn:
    """Whose turn it is on one session.

    An operation takes the turn, and is refused while another caller has it. An end waits for the
    operation in flight; whoever comes while an end waits or runs, waits for the end.

    Args:
        database: What the errors name.
        caller: Who is asking: the current task on an async session, the thread on a sync one.
        wait: How that caller waits.
    """

    __slots__ = (
        "_caller",
        "_database",
        "_depth",
        "_ending",
        "_holder",
        "_mutex",
        "_over",
        "_wait",
        "_waiting",
    )

    def __init__(
        self, database: object, caller: Callable[[], object], wait: Callable[[Future[None]], None]
    ) -> None:
        self._database = database
        self._caller = caller
        self._wait = wait
        self._mutex = threading.Lock()
        self._holder: object = None
        self._ending: object = None
        self._depth = 0
        self._over = False
        self._waiting: list[Future[None]] = []

    def take(self, *, to_end: bool = False) -> None:
        """Begin an operation or, with `to_end`, the end of the work done so far.

        Raises:
            ConcurrentUse: Another task (thread) is in the middle of an operation.
            SessionClosed: The unit of work is over.
        """
        caller = self._caller()
        if self._holder == caller:  # an operation inside an operation: autoflush, lazy loading
            self._depth += 1
            return
        while (released := self._try_to_take(caller, to_end=to_end)) is not None:
            self._wait(released)

    def take_if_free(self) -> bool:
        """Begin an operation unless someone is in one; never waits, never raises."""
        with self._mutex:
            if self._holder is not None or self._ending is not None:
                return False
            self._holder = self._caller()
            self._depth = 1
            return True

    def give(self, *, over: bool = False) -> None:
        """Finish what was begun; with `over`, no operation begins ever again."""
        self._depth -= 1
        if self._depth:
            return
        with self._mutex:
            if self._ending == self._holder:
                self._ending = None
            self._holder = None
            self._over = self._over or over
            waiting, self._waiting = self._waiting, []
        for released in waiting:
            if released.set_running_or_notify_cancel():  # else its waiter was cancelled
                released.set_result(None)

    def refuse_if_over(self) -> None:
        """Raise `SessionClosed` when the unit of work is over."""
        if self._over:
            raise SessionClosed(self._database)

    def _try_to_take(self, caller: object, *, to_end: bool) -> Future[None] | None:
        with self._mutex:
            self.refuse_if_over()
            if self._ending is None and to_end:
                self._ending = caller
            if self._holder is None and self._ending in (None, caller):
                self._holder = caller
                self._depth = 1
                return None
            if self._ending is None:
                raise ConcurrentUse(self._database)
            released: Future[None] = Future()
            self._waiting.append(released)
            return released


def turn_between_tasks(database: object) -> Turn:
    """Turns on an async session: a caller is a task, and the loop goes on while it waits."""
    return Turn(database, asyncio.current_task, _wait_in_greenlet)


def turn_between_threads(database: object) -> Turn:
    """Turns on a sync session: a caller is a thread, and blocks while it waits."""
    return Turn(database, threading.get_ident, Future[None].result)


def _wait_in_greenlet(released: Future[None]) -> None:
    await_only(asyncio.wrap_future(released))
