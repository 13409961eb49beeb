"""The report that `on_report` gets after each unit of work."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from asgi_dbsession.session.end import Reason
from asgi_dbsession.types import Scope

Outcome: TypeAlias = Literal["committed", "rolled_back", "nothing_to_do"]


@dataclass(frozen=True)
class DatabaseReport:
    """What a unit of work did with one database. All durations are in seconds.

    Attributes:
        database: The `AsyncDatabase` or `SyncDatabase`.
        committed: True if this package or the application committed work on this database.
        statements: How many statements were sent. Savepoints are counted. BEGIN, COMMIT and
            ROLLBACK are not counted.
        operation_duration: How long statements, COMMIT and ROLLBACK took.
        wait_time: How long the unit of work waited for a connection.
        use_time: How long the unit of work held a connection of the pool.
        idle_time: The longest time in which a connection was held, but not used.
        idle_after: The application's line (`file:line`) that used the session before `idle_time`.
            None if no such line was found.
        idle_before: The line that used the session after `idle_time`. None if the unit of work
            ended then.
    """

    database: Any
    committed: bool
    statements: int
    operation_duration: float
    wait_time: float
    use_time: float
    idle_time: float
    idle_after: str | None
    idle_before: str | None


@dataclass(frozen=True)
class UnitReport:
    """What one unit of work did, and how long it took.

    Attributes:
        scope: The ASGI scope of the request. None outside of a request, and after its end.
        outcome: `"committed"` or `"rolled_back"`. `"nothing_to_do"` if no transaction was begun.
        reason: Why the unit of work was not committed. None if nothing prevented the COMMIT.
            `status`: the status of the response, or the close code of the WebSocket.
            `set_rollback`: the application called `set_rollback(True)`. `exception`: the
            application raised an exception. `cancelled`: the client disconnected, a time-out was
            reached, or the request is retried. `unfinished`: the application returned before the
            response was complete. `commit_failed`: a COMMIT failed; databases before it may be
            committed. Later versions may add reasons.
        error: The exception of the application or of COMMIT, or None.
        start_time: When the unit of work began, in seconds since the epoch (1970).
        duration: How long the unit of work took, in seconds, including its `on_commit` functions.
        databases: What was done with each database that was used, in the order of the
            arguments of `DBSessionMiddleware`.
        attempt: 1 for the first attempt to serve the request, 2 for the first retry, and so on.
        will_retry: True if a retry of the request is expected. False for a `begin()` block.
        read_only: True if the unit of work was allowed to read only.
    """

    # `repr()` leaves out the scope, because the headers in it may be secret.
    scope: Scope = field(repr=False)
    outcome: Outcome
    reason: Reason | None
    # `repr()` leaves out the error, because its text may contain data of a user.
    error: BaseException | None = field(repr=False)
    start_time: float
    duration: float
    databases: tuple[DatabaseReport, ...]
    attempt: int = 1
    will_retry: bool = False
    read_only: bool = False
