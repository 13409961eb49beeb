"""Which run of a request, or of a transaction, this is."""

from contextvars import ContextVar
from dataclasses import dataclass

from asgi_dbsession.session.lock import End


@dataclass(frozen=True)
class Attempt:
    """One run of a request, or of a function in `run_transaction`.

    Attributes:
        number: 1 for the first run.
        remaining: How many may follow if this run meets a conflict; 0 for the last one.
    """

    number: int = 1
    remaining: int = 0


class RunningAttempt:
    """An attempt that is under way. The optional room `retry` knows whether another one follows.

    Args:
        attempt: What the application is told.
    """

    def __init__(self, attempt: Attempt) -> None:
        self.attempt: Attempt = attempt

    def will_retry(self, _end: End) -> bool:
        """Whether another attempt follows, as far as can be known when the work ends like this."""
        return False


running_attempt: ContextVar[RunningAttempt | None] = ContextVar(
    "asgi_dbsession.attempt", default=None
)


def current_attempt() -> Attempt:
    """Which attempt this code runs in: of its request, or of `run_transaction`.

    Returns:
        The first and last one where nothing is retried.
    """
    running = running_attempt.get()
    return running.attempt if running is not None else Attempt()
