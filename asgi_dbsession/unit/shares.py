"""Whose uncommitted work a task may speak for, where several tasks used one session."""

from typing import Any, Literal, TypeAlias

from asgi_dbsession.errors import ConcurrentUse
from asgi_dbsession.session.lock import SessionLock
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.tasks import is_waiting_for

Sessions: TypeAlias = list[ManagedSession[Any]]

# What to do where another task, which has not ended, has work on the session of the sender:
# "refuse" on a WebSocket, "leave" its work alone in the body of a response, and "include" it when
# the application has returned.
Living: TypeAlias = Literal["refuse", "leave", "include"]


def sort_work(sessions: Sessions, task: object, living: Living) -> tuple[Sessions, Sessions]:
    """Sort sessions with uncommitted work by what `task` may say about them.

    The work of tasks that have ended well counts as its own: it has waited for them. The work of a
    task that has ended with an exception is rolled back.

    Returns:
        Those that end as `task` says, and those that must be rolled back. The others are left.

    Raises:
        ConcurrentUse: Work of `task` and of another one are in the same transaction, and only one
            of them may be committed.
    """
    own: Sessions = []
    failed: Sessions = []
    for opened in sessions:
        lock = opened.lock
        lock.sort_out_users()
        others = {each for each in lock.users if not _speaks_for(task, each)}
        is_own = lock.has_finished_work or len(others) < len(lock.users) or _is_in_memory(lock)
        if (others or lock.is_busy) and living != "include":
            if is_own and living == "refuse":
                raise ConcurrentUse(lock.database, mixed_with="living")
        elif not lock.has_failed_work:
            own.append(opened)
        elif is_own:
            raise ConcurrentUse(lock.database, mixed_with="failed")
        else:
            failed.append(opened)
    return own, failed


def _speaks_for(task: object, user: object) -> bool:
    return user is task or is_waiting_for(user, task)


def _is_in_memory(lock: SessionLock) -> bool:
    """Whether all that is left to commit are changed attributes, which no operation reports."""
    return not lock.is_used and not lock.is_busy
