"""One operation at a time on a session, and none after its end."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from threading import Lock, get_ident

from sqlalchemy.util import await_only

from asgi_dbsession.errors import ConcurrentUse, ConfigurationError, SessionClosed

# Held for a few instructions at a time, so one is enough for all.
_reserving = Lock()

# Who has the turn of a session that is over: nobody ever gives it back.
_OVER = object()

# What ends sessions together, in several threads perhaps: it must not wait for itself.
current_end: ContextVar[object] = ContextVar("asgi_dbsession.end", default=None)


class Turn:
    """Whose turn it is on one session.

    An operation takes the turn, and is refused while another caller has it. An end waits for the
    operation in flight; whoever comes while an end waits or runs, waits for the end.

    Args:
        database: What the errors name.
        caller: Who is asking: the current task on an async session, the thread on a sync one. It
            raises RuntimeError where there is no task.
        wait: How that caller waits.

    Attributes:
        workers: Who began operations since the last end began, but for tasks that are done.
    """

    __slots__ = (
        "_caller",
        "_ending",
        "_free",
        "_holder",
        "_wait",
        "_waiting",
        "database",
        "workers",
    )

    def __init__(
        self, database: object, caller: Callable[[], object], wait: Callable[[Future[None]], None]
    ) -> None:
        self.database: object = database
        self._caller = caller
        self._wait = wait
        self._free = Lock()
        self._holder: object = None
        self._ending: object = None
        self._waiting: list[Future[None]] = []
        self.workers: set[object] = set()

    @property
    def is_busy(self) -> bool:
        """Whether an operation or an end is under way, or an end waits."""
        return self._ending is not None or self._free.locked()

    def is_ended_here(self) -> bool:
        """Whether the caller is the one who has the turn to end the work."""
        if self._ending is None or self._ending != self._holder:
            return False
        try:
            return self._ending == self._caller()
        except RuntimeError:
            return False

    def touch(self) -> None:
        """Count what needs no turn, because it is done at once and in memory.

        Raises:
            SessionClosed: The unit of work is over.
        """
        if self._ending is _OVER:
            raise SessionClosed(self.database)
        try:
            caller = self._caller()
        except RuntimeError as error:
            raise self._error_of_thread() from error
        if caller not in self.workers:
            self._note(caller)

    def take(self) -> bool:
        """Begin an operation.

        Returns:
            False inside an operation of the same caller (autoflush, lazy loading), which goes on
            having the turn: only who took it gives it back.

        Raises:
            ConcurrentUse: Another task (thread) is in the middle of an operation.
            SessionClosed: The unit of work is over.
        """
        try:
            caller = self._caller()
        except RuntimeError as error:
            raise self._error_of_thread() from error
        if self._holder is not None and self._holder == caller:
            return False
        if self._ending is None and self._free.acquire(False):
            self._holder = caller
        elif not self._claim_after_end(caller):
            return False
        if not self.workers:
            self.workers.add(caller)
        elif caller not in self.workers:
            self._note(caller)
        return True

    def take_to_end(self) -> None:
        """Begin the end of the work done so far; waits for the operation in flight.

        Raises:
            SessionClosed: The unit of work is over.
        """
        caller = self._caller()
        try:
            while True:
                with _reserving:
                    if self._ending is None:
                        self._ending = caller
                if self._claim(caller, ending=caller):
                    self.workers.clear()
                    return
                self._wait_for_release(ending=caller)
        except BaseException:  # cancelled with its whole loop: nobody must wait for it for ever
            if self._ending == caller:
                self._ending = None
                self._wake()
            raise

    def keep(self) -> None:
        """Let whoever goes on with `current_end` have the turn, whichever thread he is in."""
        self._holder = self._ending = current_end.get()

    def go_on_ending(self) -> None:
        """Go on with an end that was begun, and whose turn was kept."""
        self._holder = self._ending = self._caller()

    def take_to_end_if_free(self) -> bool:
        """The same unless someone is in an operation; never waits."""
        try:
            caller = self._caller()
        except RuntimeError:  # of a thread, which ends no session of a task
            return False
        if self._ending is not None or not self._free.acquire(False):
            return False
        self._holder = self._ending = caller
        return True

    def give(self, *, over: bool = False) -> None:
        """Finish what was begun; with `over`, no operation begins ever again."""
        ended = self._ending is not None and self._ending == self._holder
        self._holder = None
        if over:
            self._ending = _OVER
        else:
            self._free.release()
            if ended:  # only now, or someone would be refused who only has to wait
                self._ending = None
        if self._waiting:
            self._wake()

    def _note(self, caller: object) -> None:
        if self.workers:
            # `asyncio.wait_for` makes a task for each call before Python 3.12: must not pile up.
            self.workers = {each for each in self.workers if not is_done(each)}
        self.workers.add(caller)

    def _error_of_thread(self) -> ConfigurationError:
        return ConfigurationError(
            f"This session of {self.database} was used in a thread, where nothing can be awaited. "
            "Use it in an `async def` function, or give DBSessionMiddleware an object of the class "
            "SyncDatabase for what is written with `def`."
        )

    def _claim(self, caller: object, ending: object = None) -> bool:
        if self._ending is _OVER:
            raise SessionClosed(self.database)
        if self._ending is not ending or not self._free.acquire(False):
            return False
        self._holder = caller
        return True

    def _claim_after_end(self, caller: object) -> bool:
        while not self._claim(caller):
            ending = self._ending  # asked once: it may be over before it is asked again
            if ending is not None and ending is current_end.get():
                return False  # a listener of another session that ends; SQLAlchemy will refuse it
            if ending is not None:
                self._wait_for_release()
            elif self._claim(caller):  # what was in the way was an end, and is done by now
                break
            else:
                raise ConcurrentUse(self.database)
        return True

    def _wait_for_release(self, ending: object = None) -> None:
        released: Future[None] = Future()
        with _reserving:
            self._waiting.append(released)
        # It may have been released before it could know of us: then nobody will wake us.
        if self._ending is not _OVER and (
            self._free.locked() or self._ending not in (None, ending)
        ):
            self._wait(released)

    def _wake(self) -> None:
        with _reserving:
            waiting, self._waiting = self._waiting, []
        for released in waiting:
            if released.set_running_or_notify_cancel():  # else its waiter was cancelled
                released.set_result(None)


def current_task() -> object:
    """The running task; None in a worker thread, which has none, and on trio."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def is_done(caller: object) -> bool:
    """Whether it is a task that has ended; what it did is for others to end."""
    return isinstance(caller, asyncio.Future) and caller.done()


def _wait_in_greenlet(released: Future[None]) -> None:
    await_only(asyncio.wrap_future(released))


# On an async session a caller is a task, and the loop goes on while it waits; on a sync one it is a
# thread, and blocks.
BETWEEN_TASKS = asyncio.current_task, _wait_in_greenlet
BETWEEN_THREADS = get_ident, Future[None].result
