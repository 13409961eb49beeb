"""The runs of `storm` that the page shows."""

from statistics import quantiles
from typing import NamedTuple

from .storm import CAPACITY, PATIENCE, RECONNECTS, RETRIES, Crowd

TIMEOUTS = (0.05, 0.2, 0.5, 2.0, 4.0, 30.0)  # seconds; the last one is SQLAlchemy's
LIGHT, HEAVY, USUAL = 0.95, 1.2, 0.7
STOP = 10.0  # seconds
LISTENERS = 1_500
START = 10
SECONDS = 60  # of each run
SOON = 0.5  # seconds


class Limit(NamedTuple):
    """What a `pool_timeout` does.

    Attributes:
        timeout: Seconds.
        refused: The share that is refused under a light load.
        useful: Answers in time per second under a heavy load.
        taken: Seconds that nineteen of twenty of them took at most.
        late: Answers per second that came after their client had left.
    """

    timeout: float
    refused: float
    useful: float
    taken: float
    late: float


class Storm(NamedTuple):
    """What retries do.

    Attributes:
        retry: When clients try again.
        timeout: The `pool_timeout`.
        most: Requests in the worst second, in multiples of the usual number.
        unanswered: The share of clients that have had no answer by the end.
        recovered: Seconds until requests were as many as usual; None if they never were.
    """

    retry: str
    timeout: float
    most: float
    unanswered: float
    recovered: int | None


def limits(seconds: int, seed: int) -> list[Limit]:
    """Each `pool_timeout`, under a light and a heavy load without retries."""
    found = []
    for timeout in TIMEOUTS:
        light, heavy = Crowd(timeout, seed), Crowd(timeout, seed)
        for crowd, load in ((light, LIGHT), (heavy, HEAVY)):
            crowd.come(load)
            crowd.run(seconds)
        half = seconds // 2
        useful = sum(heavy.answers[second] for second in range(half, seconds)) / (seconds - half)
        late = sum(taken > PATIENCE for taken in heavy.model.outcome.taken) / seconds
        taken = quantiles(heavy.taken, n=20)[-1]
        found.append(Limit(timeout, light.left / light.came, useful, taken, late))
    return found


def stops(seconds: int, seed: int) -> list[Storm]:
    """The database stops for a while, and clients try again."""
    found = []
    for timeout in (SOON, TIMEOUTS[-1]):
        for retry in RETRIES:
            crowd = Crowd(timeout, seed, retry)
            crowd.come(USUAL)
            crowd.stop_database(START, STOP)
            crowd.run(seconds)
            found.append(_storm(crowd, retry.name, START + int(STOP), seconds))
    return found


def reconnections(seconds: int, seed: int) -> list[Storm]:
    """Listeners are cut off all at once, as in a deployment, and come back."""
    found = []
    for pause in RECONNECTS:
        crowd = Crowd(SOON, seed)
        crowd.come(USUAL)
        crowd.cut_off(START, LISTENERS, pause)
        crowd.run(seconds)
        found.append(_storm(crowd, pause.name, START, seconds))
    return found


def _storm(crowd: Crowd, retry: str, since: int, until: int) -> Storm:
    most = max(crowd.tries.values()) / (USUAL * CAPACITY)
    after = crowd.recovered(USUAL, since, until)
    unanswered = 1 - crowd.answered / crowd.came
    return Storm(retry, crowd.pool_timeout, most, unanswered, after)
