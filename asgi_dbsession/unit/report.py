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
        committed: True if work on this database was committed, by this package or by the
            application itself.
        statements: How many statements were sent. Savepoints and SELECTs for new primary keys are
            counted. BEGIN, COMMIT and ROLLBACK are not counted.
        operation_duration: How long statements, COMMIT and ROLLBACK took.
        wait_time: How long the unit of work waited for a connection of the pool, or for a new
            connection.
        use_time: How long the unit of work held a connection of the pool.
        idle_time: The longest time in which the unit of work held a connection but ran no
            operation. In this time, the application did something else, and other requests may have
            waited for a connection.
        idle_after: The line of the application (`file:line`) that used the session last before
            `idle_time`. None if this package finds no such line.
        idle_before: The line of the application (`file:line`) that used the session first after
            `idle_time`. None if the unit of work ended then.
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
        scope: The ASGI scope of the request. None if the unit of work began outside of a request,
            or after the request had ended.
        outcome: `"committed"` or `"rolled_back"`. `"nothing_to_do"` if no transaction was begun.
        reason: Why the unit of work was not committed. None if nothing prevented the COMMIT.
            `status`: because of the status of the response, or the close code of the WebSocket.
            `set_rollback`: the application called `set_rollback(True)`. `exception`: the
            application raised an exception. `cancelled`: the client disconnected, a time-out was
            reached, or the request is retried. `unfinished`: the application returned before the
            response was complete. `commit_failed`: COMMIT failed on one database; databases before
            it may be committed. Later versions may add reasons.
        error: The exception of the application or of COMMIT. None if there was no exception.
        start_time: When the unit of work began, in seconds since the epoch (1970). It began with
            the request, or after the previous unit of work of the same request.
        duration: How long the unit of work took, in seconds, including its `on_commit` functions.
        databases: The databases of which the unit of work opened sessions, in the order of the
            arguments of `DBSessionMiddleware`.
        attempt: 1 for the first attempt to serve the request, 2 for the first retry, and so on.
        will_retry: True if the request will be retried because of a conflict, as far as is known
            when the unit of work ends. False for a `begin()` block inside a request.
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
