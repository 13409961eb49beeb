"""What one `rolled_back` block knows, and the error for what it cannot show."""

from dataclasses import dataclass, field
from threading import Thread, enumerate as enumerate_threads
from typing import Any
from weakref import WeakSet

from asgi_dbsession.errors import DBSessionError


class NotIsolated(DBSessionError, RuntimeError):
    """One shared connection cannot do what several connections would have done.

    Args:
        database: The URL that the error names, without its password.
        what: What happened, as a sentence.
        cure: What to write instead, as a sentence.
    """

    def __init__(self, database: str, what: str, cure: str | None = None) -> None:
        cure = cure or (
            f"Inside `rolled_back`, all transactions on {database} take turns on one connection: "
            "test what needs several connections on a database of its own, without `rolled_back`."
        )
        super().__init__(f"{what} {cure}")


_STOP = (
    "Stop tasks, threads, schedulers and listeners first: cancel and await tasks, join threads, "
    "shut schedulers down."
)


def outlived(database: str) -> NotIsolated:
    """The error for work that goes on after the end of its test."""
    return NotIsolated(
        database,
        f"This work outlived its test: the `rolled_back` block around {database} has ended, and "
        "everything in it was rolled back.",
        _STOP,
    )


def disposed(database: str) -> NotIsolated:
    """The error for work that goes on after the end of its engine, inside of the test."""
    return NotIsolated(
        database,
        f"This work outlived the engine of {database}, which was disposed inside of the "
        "`rolled_back` block, as at the end of `with TestClient(app):`.",
        _STOP,
    )


@dataclass(eq=False)
class Isolation:
    """What all engines of one `rolled_back` block share.

    Args:
        timeout: Seconds that a transaction waits for another one.
        test: The caller that entered the block.

    Attributes:
        violations: What would have ended differently on several connections.
        has_ended: Whether the block has ended.
        threads: The threads from before the first block around these databases.
        tasks: The tasks that used a session inside of such a block.
    """

    timeout: float
    test: object
    violations: list[Exception] = field(default_factory=list)
    has_ended: bool = False
    threads: WeakSet[Thread] = field(default_factory=lambda: WeakSet(enumerate_threads()))
    tasks: WeakSet[Any] = field(default_factory=WeakSet)
