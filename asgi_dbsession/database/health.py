"""Whether a database answers, and how much of its pool is in use."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Health:
    """What `database.health()` found.

    Attributes:
        answers: Whether it ran a statement in the time given.
        latency: Seconds that this took, waiting for a connection included; None without an answer.
        reason: Why there was no answer, without password, but with the name of the server: for the
            log rather than the public.
        pool_size: How many connections the pool keeps; None, as all below, before startup and for
            a pool of a kind that does not count.
        checked_out: How many are in use.
        overflow: How many there are beyond `pool_size`.
    """

    answers: bool
    latency: float | None
    reason: str | None
    pool_size: int | None
    checked_out: int | None
    overflow: int | None
