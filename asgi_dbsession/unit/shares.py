"""Decides whose uncommitted work is committed, if several tasks used one session."""

from typing import Literal, TypeAlias

from asgi_dbsession.errors import ConcurrentUse
from asgi_dbsession.session.lock import SessionLock
from asgi_dbsession.session.managed import Sessions
from asgi_dbsession.session.tasks import current_task, has_ended, is_waiting_for

from .unit_of_work import UnitOfWork

# One task is about to commit its work. A living task (another task that is still running) has work
# in the same session, and a COMMIT would store this unfinished work too. So `sort_work` does this:
#
# "refuse", for WebSockets: raise ConcurrentUse if both tasks have work in the session.
# "leave", at the end of a response body: do not commit this session yet. It is committed when the
# application has returned.
# "include", after the application has returned: commit the work of all tasks, because no later
# COMMIT follows.
Living: TypeAlias = Literal["refuse", "leave", "include"]


def sort_work(
    unit: UnitOfWork, sessions: Sessions, task: object, living: Living
) -> tuple[Sessions, Sessions]:
    """Choose the sessions to commit or roll back before `task` sends or waits for a message.

    The work of a task that has returned counts as work of `task`, because `task` has probably
    waited for it. The work of a task that raised an exception must be rolled back.

    Returns:
        A pair of lists. (1) The sessions whose work counts as work of `task`. The caller commits
        this work, or rolls it back, for example before a message that reports an error. (2) The
        sessions that only failed tasks have used, which must be rolled back. Sessions in neither
        list stay as they are.

    Raises:
        ConcurrentUse: One transaction has work of `task` and work of another task that is still
            running or has failed. Then the unit of work has failed, too.
    """
    own: Sessions = []
    failed: Sessions = []
    for opened in sessions:
        lock = opened.lock
        lock.sort_out_users()
        changer = lock.last_user if _is_in_memory(lock) else None
        if changer is not None and not has_ended(changer):
            lock.users.add(changer)
        # `task` may be the child of a parent task that only waits for it. (Before Python 3.12,
        # `asyncio.wait_for` runs its coroutine in such a child.) Then the parent task cannot work
        # meanwhile, so its work is finished, and counts as work of `task`.
        others = {
            each for each in lock.users if each is not task and not is_waiting_for(each, task)
        }
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

    Args:
        unit: The unit of work.
        working: The sessions of the unit of work that have uncommitted work.

    Returns:
        A pair. (1) False if no session may be committed, because one transaction has work of both
        failed and successful tasks. Otherwise True. (2) If (1) is True, the sessions that only
        failed tasks have used. They must be rolled back. All others may be committed.
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
    """Return True if the only work of a session is changed attributes of Python objects.

    SQLAlchemy does not report which task changed an attribute. So the change counts as work of the
    task that used the session last. If that task has ended, the change counts as work of the task
    that commits now.
    """
    return not lock.is_used and not lock.is_busy
