"""The number of the current attempt to run a request or a function of `run_transaction`."""

from contextvars import ContextVar
from dataclasses import dataclass

from asgi_dbsession.session.end import End


@dataclass(frozen=True)
class Attempt:
    """One attempt to run a request, or the function given to `run_transaction`.

    If the database reports a conflict with another transaction, a further attempt can follow.

    Attributes:
        number: 1 for the first attempt, 2 for the first retry.
        remaining: How many attempts may still follow if this attempt meets a conflict. 0 for the
            last attempt.
    """

    number: int = 1
    remaining: int = 0


class RunningAttempt:
    """The current attempt to run a request, or to call the function given to `run_transaction`.

    This class is for the last attempt, after which no retry follows. The package `retry` has a
    subclass for attempts after which a retry may follow.

    Args:
        attempt: The object that `current_attempt()` returns to the application.
    """

    def __init__(self, attempt: Attempt) -> None:
        self.attempt: Attempt = attempt

    @property
    def can_retry(self) -> bool:
        """True if a retry is possible: there was a conflict, and nothing was committed."""
        return False

    def will_retry(self, _end: End) -> bool:
        """Return True if a retry follows after this commit or rollback, as far as is known now."""
        return False


# The attempt of code that is never retried.
_ONLY = RunningAttempt(Attempt())
running_attempt: ContextVar[RunningAttempt] = ContextVar("asgi_dbsession.attempt", default=_ONLY)


def current_attempt() -> Attempt:
    """Return the running attempt of the current request, or of the current `run_transaction`.

    Returns:
        The running attempt. `Attempt(number=1, remaining=0)` if the calling code is never retried.
    """
    return running_attempt.get().attempt
