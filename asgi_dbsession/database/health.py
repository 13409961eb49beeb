"""The class `Health`, which is the result of `database.health()`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Health:
    """The result of `database.health()`.

    Attributes:
        answers: True if the database answered within the time limit.
        latency: How many seconds the answer took, including the wait for a connection. None if
            there was no answer.
        reason: Why the database did not answer, or None. The text has no password in it, but it has
            the name of the server. So show it in logs only.
        pool_size: How many connections the pool keeps open. None before startup, or if the pool
            does not count its connections.
        checked_out: How many connections are in use; None in the same cases as `pool_size`.
        overflow: How many connections are open beyond `pool_size`; None in the same cases as
            `pool_size`.
        replicas: The health of each replica, in the order of the URLs.
    """

    answers: bool
    latency: float | None
    reason: str | None
    pool_size: int | None
    checked_out: int | None
    overflow: int | None
    replicas: "tuple[Health, ...]" = ()
