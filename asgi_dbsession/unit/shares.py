"""Decides whose uncommitted work is committed, if several tasks used one session."""

from typing import Literal, TypeAlias

from asgi_dbsession.errors import ConcurrentUse
from asgi_dbsession.session.lock import SessionLock
from asgi_dbsession.session.managed import Sessions
from asgi_dbsession.session.tasks import current_task, has_ended, is_waiting_for

from .unit_of_work import UnitOfWork

# When a task commits, what to do with a session that has work of another running task:
# "refuse" (WebSockets): raise ConcurrentUse.
# "leave" (response bodies): commit the session when the application has returned.
# "include" (at the end of the request): commit the session now.
Living: TypeAlias = Literal["refuse", "leave", "include"]


def sort_work(
    unit: UnitOfWork, sessions: Sessions, task: object, living: Living
) -> tuple[Sessions, Sessions]:
    """Choose the sessions to commit or roll back before `task` sends or waits for a message.

    Return two lists. The first has the sessions used by `task`, and by tasks that have ended
    without an error. The second has the sessions that only failed tasks have used. The caller must
    roll back the second list, even if it commits the first list. `living` says what to do with
    sessions that other running tasks have used.

    Raises:
        ConcurrentUse: A running or failed task has used a session of `task`.
    """
    own: Sessions = []
    failed: Sessions = []
    for opened in sessions:
        lock = opened.lock
        lock.sort_out_users()
        # If only attributes of objects were changed, SQLAlchemy does not tell which task did this.
        # Assume that it was the last task that used the session.
        changer = lock.last_user if _is_in_memory(lock) else None
        if changer is not None and not has_ended(changer):
            lock.users.add(changer)
        # Find the other tasks that may still use the session. Leave out a task that waits until
        # `task` (the one that commits) has ended, because it cannot use the session meanwhile. For
        # example, before Python 3.12, `asyncio.wait_for` runs its coroutine in a new task `task`,
        # and the calling task waits.
        others = {
            each for each in lock.users if each is not task and not is_waiting_for(each, task)
        }
        # `task` has probably waited for tasks that have returned, so their work counts as its work.
        is_own = lock.has_finished_work or len(others) < len(lock.users) or _is_in_memory(lock)
        if (others or lock.is_busy) and living != "include":
            if is_own and living == "refuse":
                unit.failure = ConcurrentUse(lock.database, mixed_with="living")
                raise unit.failure
        elif not lock.has_failed_work:
            own.append(opened)
        elif is_own:
            unit.failure = ConcurrentUse(lock.database, mixed_with="failed")
            raise unit.failure
        else:
            failed.append(opened)
    return own, failed


def find_failed(unit: UnitOfWork, working: Sessions) -> tuple[bool, Sessions]:
    """Find the sessions that only failed tasks have used, after the application has returned.

    Return True and these sessions. The caller must roll them back, and may commit the others.
    Return False and no sessions if one transaction has work of both failed and successful tasks.
    Then the caller must roll back all sessions.
    """
    sessions = [each for each in working if each.has_work]
    try:
        _, failed = sort_work(unit, sessions, current_task(), "include")
    except ConcurrentUse:
        return False, []
    return True, failed


def is_of(task: object, asking: object) -> bool:
    """Return True if a commit for the task `asking` includes the work of the task `task`.

    A commit for a task includes the work of this task, and of tasks that have ended. If `asking` is
    None, the commit includes the work of all tasks.
    """
    return asking is None or task is None or task is asking or has_ended(task)


def _is_in_memory(lock: SessionLock) -> bool:
    """Return True if no operation of the session was called since the last commit or rollback.

    A change of an attribute of an ORM object is no operation. So if such a session has something to
    commit, a task has only changed attributes.
    """
    return not lock.is_used and not lock.is_busy
