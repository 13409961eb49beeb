"""The result of a health check of a database and its pool."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Health:
    """The result of `database.health()`.

    Attributes:
        answers: True if the database ran a statement within the time limit.
        latency: Seconds until the database answered, including the wait for a connection; None if
            the database did not answer.
        reason: Why the database did not answer. The text contains no password, but it contains the
            name of the server, so show it in logs only.
        pool_size: How many connections the pool keeps. None before startup, or if the pool does not
            count its connections.
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
