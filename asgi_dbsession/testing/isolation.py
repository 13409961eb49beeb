"""The data of a `with rolled_back(...)` block, and the error if it cannot roll back all work."""

from dataclasses import dataclass, field
from threading import Thread, enumerate as enumerate_threads
from typing import Any
from weakref import WeakSet

from asgi_dbsession.errors import DBSessionError


class NotIsolated(DBSessionError, RuntimeError):
    """Raised in a `with rolled_back(...)` block if code would behave differently in production.

    `rolled_back` undoes all work of a test. For this, all transactions in its block share one
    connection, which is the usual reason for this error. A task or thread that still uses the
    database after the end of the block gets this error too.

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
    """The data of one `with rolled_back(...)` block, which undoes all work of one test.

    Args:
        timeout: For how many seconds a transaction waits until another transaction has ended.
        test: The task or thread that entered the block: the test or its fixture.

    Attributes:
        violations: Errors about code that would behave differently in production, where each
            transaction has its own connection. The block raises the first error at its end.
        has_ended: True if the block has ended.
        threads: The threads that were already running before the first such block of these
            databases. No test has started them, so they may use a database after a block.
        tasks: The tasks that used a session in such a block. A test has started them, so they may
            not use a database after the block.
    """

    timeout: float
    test: object
    violations: list[Exception] = field(default_factory=list)
    has_ended: bool = False
    threads: WeakSet[Thread] = field(default_factory=lambda: WeakSet(enumerate_threads()))
    tasks: WeakSet[Any] = field(default_factory=WeakSet)
