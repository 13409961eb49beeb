"""The state of a `rolled_back` block, and the error `NotIsolated`."""

from dataclasses import dataclass, field
from threading import Thread, enumerate as enumerate_threads
from typing import Any
from weakref import WeakSet

from asgi_dbsession.errors import DBSessionError


class NotIsolated(DBSessionError, RuntimeError):
    """The shared connection of a test cannot give the same result as several connections.

    Args:
        database: The URL to show in the error, without its password.
        what: A sentence about what happened.
        cure: A sentence about what to write instead.
    """

    def __init__(self, database: str, what: str, cure: str | None = None) -> None:
        cure = cure or (
            f"Inside `rolled_back`, all transactions on {database} share one connection. Test "
            "code that needs several connections on a separate database, without `rolled_back`."
        )
        super().__init__(f"{what} {cure}")


_STOP = (
    "Stop tasks, threads, schedulers and listeners first: cancel and await tasks, join threads, "
    "shut schedulers down."
)


def outlived(database: str) -> NotIsolated:
    """Return the error for work that uses the database after the end of its test."""
    return NotIsolated(
        database,
        f"This work outlived its test: the `rolled_back` block around {database} has ended, and "
        "everything in it was rolled back.",
        _STOP,
    )


def disposed(database: str) -> NotIsolated:
    """Return the error for work that still uses an engine after the engine was disposed."""
    return NotIsolated(
        database,
        f"This work outlived the engine of {database}, which was disposed inside of the "
        "`rolled_back` block, as at the end of `with TestClient(app):`.",
        _STOP,
    )


@dataclass(eq=False)
class Isolation:
    """The state that all engines of one `rolled_back` block share.

    Args:
        timeout: How many seconds a transaction waits for the end of another transaction.
        test: The task or thread that entered the block.

    Attributes:
        violations: Errors about work that would have had another result on several connections.
        has_ended: True if the block has ended.
        threads: The threads that ran before the first `rolled_back` block around these databases.
        tasks: The tasks that used a session inside a `rolled_back` block.
    """

    timeout: float
    test: object
    violations: list[Exception] = field(default_factory=list)
    has_ended: bool = False
    threads: WeakSet[Thread] = field(default_factory=lambda: WeakSet(enumerate_threads()))
    tasks: WeakSet[Any] = field(default_factory=WeakSet)
