"""The report of a finished unit of work."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from asgi_dbsession.session.lock import Reason
from asgi_dbsession.types import Scope

Outcome: TypeAlias = Literal["committed", "rolled_back", "nothing_to_do"]


@dataclass(frozen=True)
class DatabaseReport:
    """What a unit of work did with one database. All times are in seconds.

    Attributes:
        database: The `AsyncDatabase` or `SyncDatabase`.
        committed: True if this package or the application committed work on the database.
        statements: The number of statements sent. Savepoints and SELECTs for new keys count; BEGIN,
            COMMIT and ROLLBACK do not.
        operation_duration: The time for statements, COMMIT and ROLLBACK.
        wait_time: The time spent waiting for a connection from the pool, or for a new connection.
        use_time: The time from the checkout of the connection to its return to the pool.
        idle_time: The longest part of `use_time` in which no operation ran. The application did
            something else, while other requests may have waited for the connection.
        idle_after: The place in the application (`file:line`) that used the session before the idle
            time. None if no code of the application used the session.
        idle_before: The place in the application that used the session after the idle time. None if
            the unit ended instead.
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
    """The result and the cost of one unit of work.

    Attributes:
        scope: The ASGI scope of the request. None if the unit began after the end of the request.
        outcome: `"committed"`, `"rolled_back"`, or `"nothing_to_do"` if no transaction was begun.
        reason: Why the unit was not committed; None if nothing prevented the COMMIT. `status`: the
            status of the response, or the close code of the WebSocket. `set_rollback`: a call of
            `set_rollback(True)`. `exception`: the application raised an exception. `cancelled`: the
            client disconnected, a time-out, or a new attempt of the request. `unfinished`: the
            response was not completed. `commit_failed`: COMMIT failed on a database; earlier
            databases in the list may be `committed`. Later versions may add reasons.
        error: The exception of the application or of COMMIT; None if there was none.
        start_time: The start of the unit, in seconds since the epoch: the start of the request, or
            the end of the previous unit of the same request.
        duration: Seconds until the end of the unit, `on_commit` functions included.
        databases: The databases whose sessions the unit opened, in declared order.
        attempt: The number of the attempt to serve the request, from 1 on.
        will_retry: True if the request runs again because of a conflict, as far as known at the end
            of the unit. False for a `begin()` inside a request.
        read_only: True if the unit was only allowed to read.
    """

    scope: Scope = field(repr=False)  # not in the repr, because headers may be secret
    outcome: Outcome
    reason: Reason | None
    error: BaseException | None = field(repr=False)  # the text of an error may show data
    start_time: float
    duration: float
    databases: tuple[DatabaseReport, ...]
    attempt: int = 1
    will_retry: bool = False
    read_only: bool = False
