"""What one commit or rollback of a unit of work must do, and how it has ended."""

import sys
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import get_ident
from time import perf_counter
from typing import Literal, TypeAlias

from .tasks import current_task

Reason: TypeAlias = Literal[
    "status", "set_rollback", "exception", "cancelled", "unfinished", "commit_failed"
]


@dataclass(slots=True, weakref_slot=True, eq=False)
class End:
    """One commit or rollback of a unit of work (one request or one `begin()` block).

    Attributes:
        reason: Why the work is rolled back, for reports. Not used at a commit.
        close: True to close the sessions permanently after this commit or rollback.
        task: The task whose work is committed or rolled back. None for all tasks.
        error: The exception that the application raised, or None.
        requested_by: The task and the thread that wait for this commit or rollback.
        requested_at: When this commit or rollback was requested, as a time of `perf_counter`.
        handled: The exception that the caller was handling in an `except` block, or None.
        needs_loop: True if the event loop must run between the steps of this commit.
        had_work: True if a session had something to commit or roll back.
        failure: The exception that the commit or rollback itself raised, or None.
    """

    commit: bool
    reason: Reason
    close: bool = False
    task: object = None
    error: BaseException | None = None
    requested_by: tuple[object, int] = field(default_factory=lambda: (current_task(), get_ident()))
    requested_at: float = field(default_factory=perf_counter)
    handled: BaseException | None = field(default_factory=sys.exception)
    needs_loop: bool = False
    had_work: bool = False
    failure: BaseException | None = None

    @property
    def succeeded(self) -> bool:
        """True if the work was committed. False after a rollback or a failed COMMIT."""
        return self.commit and self.failure is None


# The commit or rollback that the current code is a part of; None outside of a commit or rollback.
current_end: ContextVar[End | None] = ContextVar("asgi_dbsession.end", default=None)


def requester() -> tuple[object, int] | None:
    """Return the task and thread that wait for the commit or rollback of the current code."""
    end = current_end.get()
    return None if end is None else end.requested_by
