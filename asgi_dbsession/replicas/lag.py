"""Finds the WAL position that a replica must have replayed, so that its lag is within `max_lag`."""

from collections import deque
from threading import Lock

from .position import Position
from .question import Answer


class Lag:
    """The WAL positions of the primary in the last seconds, each with its time.

    The times are from the clock of this process, because the clocks of the servers may differ.

    Args:
        most: How many seconds a replica may be behind the primary: the option `max_lag`.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._history: deque[Answer] = deque()
        self._mutex = Lock()

    def record(self, answer: Answer) -> None:
        """Keep the WAL position that the primary reported, unless the last one is very recent.

        So the history has at most ten positions, spread over the allowed lag.
        """
        with self._mutex:
            history = self._history
            if history:
                last = history[-1]
                passed = answer.asked - last.asked
                if passed > self._most / 2 or not answer.flushed.includes(last.flushed):
                    # Forget the earlier positions: the last answer is too old, or a replica has
                    # become the primary.
                    history.clear()
                elif passed < self._most / 10:
                    return
            history.append(answer)

    def floor(self, now: float) -> Position | None:
        """Return the WAL position of the primary `max_lag` seconds ago; None if it is unknown.

        A replica is used only if it has replayed this position.

        While the primary is down, this position rises up to the last known position of the primary.
        """
        with self._mutex:
            history = self._history
            while len(history) > 1 and history[1].asked <= now - self._most:
                history.popleft()
            return history[0].flushed if history else None
