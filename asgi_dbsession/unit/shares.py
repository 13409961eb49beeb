"""Decides which uncommitted work a task may commit if several tasks used one session."""

from typing import Any, Literal, TypeAlias

from asgi_dbsession.errors import ConcurrentUse
from asgi_dbsession.session.lock import SessionLock, current_task
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.tasks import is_waiting_for

from .unit_of_work import UnitOfWork

Sessions: TypeAlias = list[ManagedSession[Any]]

# How `sort_work` treats a session that has uncommitted work of another task, if that task is still
# running. "refuse", used on a WebSocket: raise ConcurrentUse if the sending task has work in the
# session too. "leave", used at the end of a response body: do not commit the session yet.
# "include", used after the application has returned: commit the work of all tasks.
Living: TypeAlias = Literal["refuse", "leave", "include"]


def sort_work(
    unit: UnitOfWork, sessions: Sessions, task: object, living: Living
) -> tuple[Sessions, Sessions]:
    """Find the sessions to commit or roll back before `task` sends or awaits a message.

    Work of tasks that have returned counts as work of `task`, as if `task` had waited for these
    tasks. Work of a task that raised an exception must be rolled back.

    Returns:
        Two lists: the sessions to commit or to roll back, as the message of `task` requires, and
        the sessions to roll back in any case. All other sessions must not be changed.

    Raises:
        ConcurrentUse: One transaction has work of `task` and of another task, and the other task is
            still running or has failed. The unit has failed then.
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
                raise _refuse(unit, ConcurrentUse(lock.database, mixed_with="living"))
        elif not lock.has_failed_work:
            own.append(opened)
        elif is_own:
            raise _refuse(unit, ConcurrentUse(lock.database, mixed_with="failed"))
        else:
            failed.append(opened)
    return own, failed


def find_failed(unit: UnitOfWork, working: Sessions) -> tuple[bool, Sessions]:
    """Find the work of failed tasks, after the application has returned.

    Returns:
        False if no work may be committed, because one transaction also has work of a failed task.
        And the sessions to roll back if other work is committed.
    """
    sessions = [each for each in working if each.has_work]
    try:
        _, failed = sort_work(unit, sessions, current_task(), "include")
    except ConcurrentUse:
        return False, []
    return True, failed


def with_work(unit: UnitOfWork) -> Sessions:
    """Return the sessions that have work to commit or roll back."""
    working = []
    # Copy the sessions: another thread may open a session, which changes the dictionary.
    for each in tuple(unit.sessions.values()):
        if each.has_work:
            working.append(each)
        # The application itself has committed or rolled back the session. So forget which tasks
        # used the session: its next work may be of another task.
        else:
            each.lock.forget_users()
    return working


def _refuse(unit: UnitOfWork, error: ConcurrentUse) -> ConcurrentUse:
    unit.failure = error
    return error


def _speaks_for(task: object, user: object) -> bool:
    return user is task or is_waiting_for(user, task)


def _is_in_memory(lock: SessionLock) -> bool:
    """Return True if the only work of a session is changed attributes of objects.

    SQLAlchemy does not report which task changed an attribute. So the change counts as work of the
    task that sends the message.
    """
    return not lock.is_used and not lock.is_busy
