"""The data of a `with rolled_back(...)` block, and the error if it cannot roll back all work."""

from dataclasses import dataclass, field
from threading import Thread, enumerate as enumerate_threads
from typing import Any
from weakref import WeakSet

from asgi_dbsession.errors import DBSessionError


class NotIsolated(DBSessionError, RuntimeError):
    """Raised in a `with rolled_back(...)` block if code would behave differently in production.

    In the block, all transactions share one connection, which is the usual reason for this error. A
    task or thread that uses the database after the block gets this error too.

    Args:
        database: The URL of the database, without its password.
        what: A sentence that says what happened.
        cure: A sentence that says what to write instead.
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
    """Return the error for code of a test that uses the database after the end of the test."""
    return NotIsolated(
        database,
        f"This work outlived its test: the `rolled_back` block around {database} has ended, and "
        "everything in it was rolled back.",
        _STOP,
    )


def disposed(database: str) -> NotIsolated:
    """Return the error for code that uses an engine after the engine was disposed."""
    return NotIsolated(
        database,
        f"This work outlived the engine of {database}, which was disposed inside of the "
        "`rolled_back` block, as at the end of `with TestClient(app):`.",
        _STOP,
    )


@dataclass(eq=False)
class Isolation:
    """The threads, tasks and errors of one `with rolled_back(...)` block.

    The block rolls back all work of one test. If threads or tasks of the test go on after the
    block, they get an error when they use the database.

    Args:
        timeout: For how many seconds a transaction waits until another one has ended.
        test: The task or thread that entered the block.

    Attributes:
        violations: Errors about code that would behave differently in production.
        threads: The threads that ran before the first test with the same database object. They
            are not treated as threads of the test.
        tasks: The tasks that used a session in this block or in the block of an earlier test.
        leftovers: Threads not in `threads` that were still running at the end of the block.
    """

    timeout: float
    test: object
    violations: list[Exception] = field(default_factory=list)
    has_ended: bool = False
    threads: WeakSet[Thread] = field(default_factory=lambda: WeakSet(enumerate_threads()))
    tasks: WeakSet[Any] = field(default_factory=WeakSet)
    leftovers: WeakSet[Thread] = field(default_factory=WeakSet)
