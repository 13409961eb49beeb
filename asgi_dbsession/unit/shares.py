"""Decides which uncommitted work a task may commit if several tasks used one session."""

from typing import Any, Literal, TypeAlias

from asgi_dbsession.errors import ConcurrentUse
from asgi_dbsession.session.lock import SessionLock
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.tasks import is_waiting_for

Sessions: TypeAlias = list[ManagedSession[Any]]

# How `sort_work` treats a session that has uncommitted work of another task, if that task is still
# running. "refuse", used on a WebSocket: raise ConcurrentUse if the sending task has work in the
# session too. "leave", used at the end of a response body: do not commit the session yet.
# "include", used after the application has returned: commit the work of all tasks.
Living: TypeAlias = Literal["refuse", "leave", "include"]


def sort_work(sessions: Sessions, task: object, living: Living) -> tuple[Sessions, Sessions]:
    """Find the sessions to commit or roll back before `task` sends or awaits a message.

    Work of tasks that have returned counts as work of `task`, as if `task` had waited for these
    tasks. Work of a task that raised an exception must be rolled back.

    Returns:
        Two lists: the sessions to commit or to roll back, as the message of `task` requires, and
        the sessions to roll back in any case. All other sessions must not be changed.

    Raises:
        ConcurrentUse: One transaction has work of `task` and of another task, and the other task is
            still running or has failed.
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
    """Return True if the only work of a session is changed attributes of objects.

    SQLAlchemy does not report which task changed an attribute. So the change counts as work of the
    task that sends the message.
    """
    return not lock.is_used and not lock.is_busy
