"""One commit or rollback of a unit of work: the class `End`."""

import sys
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import get_ident
from typing import Literal, TypeAlias

from .tasks import current_task

Reason: TypeAlias = Literal[
    "status", "set_rollback", "exception", "cancelled", "unfinished", "commit_failed"
]


@dataclass(slots=True, weakref_slot=True, eq=False)
class End:
    """One commit or rollback of a unit of work. Its steps may run in several threads.

    Args:
        commit: True to commit, False to roll back.
        reason: Why the work is rolled back. Reports show the reason.
        close: True to close the sessions permanently after the commit or rollback.
        task: Commit or roll back only the work of this task. None for the work of all tasks.
        error: The exception that the application raised, or None.

    Attributes:
        handled: The exception of the `except` block that started this commit or rollback, or None.
        requested_by: The task and the thread that wait for this commit or rollback. If this task or
            thread still holds the lock, a signal handler has interrupted its operation.
        needs_loop: True if the event loop runs between the steps, which use several databases.
        had_work: True if the sessions had anything to commit or roll back.
        failure: The exception that the commit or rollback itself raised. None if it succeeded.
    """

    commit: bool
    reason: Reason
    close: bool = False
    task: object = None
    error: BaseException | None = None
    requested_by: tuple[object, int] = field(default_factory=lambda: (current_task(), get_ident()))
    handled: BaseException | None = field(default_factory=sys.exception)
    needs_loop: bool = False
    had_work: bool = False
    failure: BaseException | None = None

    @property
    def succeeded(self) -> bool:
        """True if the work was committed. False after a rollback or a failed COMMIT."""
        return self.commit and self.failure is None


# The commit or rollback that is running now; None if no commit or rollback is running.
current_end: ContextVar[End | None] = ContextVar("asgi_dbsession.end", default=None)
