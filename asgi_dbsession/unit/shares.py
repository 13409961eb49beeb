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

    Return those used by `task` and by returned tasks, and those used only by failed tasks.

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
        # A task that waits for `task` cannot change the session now, so its work can be committed
        # too. (Before Python 3.12, `asyncio.wait_for` runs its coroutine in a new task.)
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
    """Find sessions that only failed tasks have used, after the application has returned.

    Return True and these sessions, to roll back. Return False if one transaction has work of both
    failed and successful tasks: then nothing may be committed.
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
    """Return True if no task has used the session since the last commit or rollback.

    If the session has work nevertheless, a task has only changed attributes of Python objects.
    """
    return not lock.is_used and not lock.is_busy
