"""The number of the current attempt of a request or transaction."""

from contextvars import ContextVar
from dataclasses import dataclass

from asgi_dbsession.session.lock import End


@dataclass(frozen=True)
class Attempt:
    """One attempt to run a request, or to run a function in `run_transaction`.

    Attributes:
        number: 1 for the first attempt.
        remaining: How many attempts may follow if this attempt meets a conflict; 0 for the last
            attempt.
    """

    number: int = 1
    remaining: int = 0


class RunningAttempt:
    """An attempt that is running; the optional package `retry` overrides `will_retry`.

    Args:
        attempt: The attempt that `current_attempt()` returns to the application.
    """

    def __init__(self, attempt: Attempt) -> None:
        self.attempt: Attempt = attempt

    def will_retry(self, _end: End) -> bool:
        """Return True if, as far as known now, a new attempt follows this commit or rollback."""
        return False


running_attempt: ContextVar[RunningAttempt | None] = ContextVar(
    "asgi_dbsession.attempt", default=None
)


def current_attempt() -> Attempt:
    """Return the attempt of the request or of `run_transaction` that this code runs in.

    Returns:
        `Attempt(number=1, remaining=0)` if this code is never retried.
    """
    running = running_attempt.get()
    return running.attempt if running is not None else Attempt()
