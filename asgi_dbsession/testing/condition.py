"""A lock that a thread or task can acquire only while a condition is true."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Lock

from sqlalchemy.util import await_only


class Condition:
    """Like `threading.Condition`, but also for asyncio tasks.

    Args:
        asynchronous: True if asyncio tasks use this object, in greenlets of SQLAlchemy. False if
            threads use it.
        timeout: For how many seconds a task or thread waits before it gets an error.
    """

    def __init__(self, *, asynchronous: bool, timeout: float) -> None:
        self.timeout: float = timeout
        self._asynchronous = asynchronous
        self._mutex = Lock()
        self._taken = False
        self._waiting: list[Future[None]] = []

    @contextmanager
    def alone(self, when: Callable[[], bool], timeout: float | None = None) -> Iterator[None]:
        """Wait until `when()` is True and no other such `with` block runs. Then run this block.

        While one block runs, all others wait. As with `threading.Condition.wait_for`, a waiting
        task or thread calls `when` again after each `with` block and each call of `wake()`.

        Raises:
            TimeoutError: `when()` did not become True within `timeout` seconds.
        """
        deadline = time.monotonic() + min(self.timeout, timeout or self.timeout)
        while (freed := self._take(when)) is not None:
            self._wait(freed, deadline - time.monotonic())
        try:
            yield
        finally:
            self._taken = False
            self.wake()

    def wake(self) -> None:
        """Let each task or thread that waits in the method `alone` check its condition again.

        The first whose condition is true begins its `with` block.
        """
        with self._mutex:
            waiting, self._waiting = self._waiting, []
        for freed in waiting:
            # Skip a task that was cancelled while it waited: nobody waits for its future any more.
            if freed.set_running_or_notify_cancel():
                freed.set_result(None)

    def _take(self, when: Callable[[], bool]) -> Future[None] | None:
        with self._mutex:
            if not self._taken and when():
                self._taken = True
                return None
            freed: Future[None] = Future()
            self._waiting.append(freed)
            return freed

    def _wait(self, freed: Future[None], seconds: float) -> None:
        if self._asynchronous:
            await_only(asyncio.wait_for(asyncio.wrap_future(freed), seconds))
        else:
            freed.result(seconds)
