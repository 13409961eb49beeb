"""What a finished unit of work has to tell."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from asgi_dbsession.session.lock import Reason
from asgi_dbsession.types import Scope

Outcome: TypeAlias = Literal["committed", "rolled_back", "nothing_to_do"]


@dataclass(frozen=True)
class DatabaseReport:
    """What a unit of work asked of one database. All times are in seconds.

    Attributes:
        database: The `AsyncDatabase` or `SyncDatabase`.
        committed: Whether anything was committed on it, also by the application itself.
        statements: How many were sent: savepoints and a database's own SELECTs for new keys too,
            BEGIN, COMMIT and ROLLBACK not.
        operation_duration: Spent with statements, COMMIT and ROLLBACK.
        wait_time: Spent waiting for a connection, for a free one or for a new one.
        use_time: From when a connection was checked out until it was back in the pool.
        idle_time: The longest time of `use_time` without an operation: of the application's own
            doing, while others may wait for the connection.
        idle_after: The place in the application (`file:line`) that used the session before that;
            None where it was the first thing, or nothing of the application's.
        idle_before: The place that used it next; None where that was the end of the unit.
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
    """How a unit of work ended, and what it took.

    Attributes:
        scope: The ASGI scope of the request that it belongs to. None: it began after its end.
        outcome: `"nothing_to_do"`: a session was asked for, and nothing begun on it.
        reason: Why what was left at its end was not committed: the `status` of the response (or the
            code of a WebSocket's close), `set_rollback`, an `exception`, being `cancelled` (a
            client that hung up, a time-out, another run of the request), a response that is
            `unfinished`, or a COMMIT that failed (`commit_failed`; databases before it may be
            `committed`). None: nothing spoke against it. There may be more reasons one day.
        error: What the application raised, or COMMIT.
        start_time: When it began, in seconds since the epoch: with the request, or where the unit
            before it ended.
        duration: Seconds until its end, `on_commit` functions included.
        databases: Those that it opened sessions of, in declared order.
        attempt: Which run of the request this was; 1 is the first.
        will_retry: Whether the request runs again because of a conflict, as far as was known when
            the unit ended. False for a `begin()` inside of a request.
    """

    scope: Scope = field(repr=False)  # it has the headers of the client
    outcome: Outcome
    reason: Reason | None
    error: BaseException | None = field(repr=False)  # its text may have values
    start_time: float
    duration: float
    databases: tuple[DatabaseReport, ...]
    attempt: int = 1
    will_retry: bool = False
