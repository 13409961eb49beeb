"""Decides which uncommitted work a task may commit if several tasks used one session."""

from typing import Any, Literal, TypeAlias

from asgi_dbsession.errors import ConcurrentUse
from asgi_dbsession.session.lock import SessionLock
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.tasks import is_waiting_for

Sessions: TypeAlias = list[ManagedSession[Any]]

# What to do with a session in which another task, still running, has uncommitted work. "refuse"
# raises ConcurrentUse (on a WebSocket). "leave" does not commit the session yet (in a response
# body). "include" commits the work of all tasks (after the application has returned).
Living: TypeAlias = Literal["refuse", "leave", "include"]


def sort_work(sessions: Sessions, task: object, living: Living) -> tuple[Sessions, Sessions]:
    """Sort sessions by what a message of `task` may do with their uncommitted work.

    Work of tasks that have returned counts as work of `task`, because `task` has waited for them.
    Work of a task that raised an exception must be rolled back.

    Returns:
        Two lists: the sessions to commit or roll back as `task` decides, and the sessions to roll
        back in any case. Sessions in neither list stay as they are.

    Raises:
        ConcurrentUse: One transaction has work of `task` and work of another task, and only one
            part may be committed.
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
    """Return True if objects have changed attributes, but no operation used the session.

    Such a change names no task, so it counts as work of the task that sends the message.
    """
    return not lock.is_used and not lock.is_busy
