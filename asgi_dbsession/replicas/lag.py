"""Finds the WAL position that a replica must have replayed to be at most `max_lag` behind."""

from collections import deque
from threading import Lock

from .position import Position
from .question import Answer


class Lag:
    """The last WAL positions of the primary, each with the time when the primary was asked.

    All times are from the clock of this process, because the clocks of the servers may differ.

    Args:
        most: The option `max_lag`: how many seconds a replica may be behind the primary.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._history: deque[Answer] = deque()
        self._mutex = Lock()

    def record(self, answer: Answer) -> None:
        """Record the WAL position that the primary has answered.

        To save memory, an answer is ignored if less than a tenth of `max_lag` has passed since the
        last recorded answer.
        """
        with self._mutex:
            history = self._history
            if history:
                last = history[-1]
                passed = answer.asked - last.asked
                if passed > self._most / 2 or not answer.flushed.includes(last.flushed):
                    # The primary was not asked for a long time, or another server has become the
                    # primary. So the recorded positions no longer tell how far a replica is behind.
                    history.clear()
                elif passed < self._most / 10:
                    return
            history.append(answer)
            # Without this line, the list of WAL positions would grow without limit in a process
            # that only writes.
            self._forget_old(answer.asked)

    def floor(self, now: float) -> Position | None:
        """Return the WAL position that a replica must have replayed to be at most `max_lag` behind.

        This is the newest recorded position that is at least `max_lag` seconds old, or else the
        oldest. None if no position is recorded.
        """
        with self._mutex:
            self._forget_old(now)
            return self._history[0].flushed if self._history else None

    def _forget_old(self, now: float) -> None:
        while len(self._history) > 1 and self._history[1].asked <= now - self._most:
            self._history.popleft()
