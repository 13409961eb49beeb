"""How far a replica may be behind its primary."""

from collections import deque
from threading import Lock

from .position import Position
from .question import Answer


class Lag:
    """Where the primary was, and when: so no clock of a server is needed.

    Args:
        most: Seconds that a replica may be behind.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._history: deque[Answer] = deque()
        self._mutex = Lock()

    def record(self, answer: Answer) -> None:
        """Remember where the primary was; a tenth of `most` is fine enough."""
        with self._mutex:
            history = self._history
            if history:
                last = history[-1]
                passed = answer.asked - last.asked
                if passed > self._most / 2 or not answer.position.includes(last.position):
                    history.clear()  # nobody asked for long, or a replica was promoted
                elif passed < self._most / 10:
                    return
            history.append(answer)

    def floor(self, now: float) -> Position | None:
        """What a replica must have replayed; None if nothing is known of the primary.

        While the primary is down, that comes to be the last position that is known of it.
        """
        with self._mutex:
            history = self._history
            while len(history) > 1 and history[1].asked <= now - self._most:
                history.popleft()
            return history[0].position if history else None
