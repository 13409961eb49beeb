"""The function `set_rollback`, which decides if the current unit of work is rolled back."""

from asgi_dbsession.errors import ConfigurationError, NoSession, SessionClosed
from asgi_dbsession.session.end import current_end
from asgi_dbsession.session.tasks import current_task, has_ended

from .current import current_unit
from .unit_of_work import UnitOfWork


def set_rollback(rollback: bool) -> None:
    """Decide if the current unit of work is rolled back, whatever the status of the response is.

    Args:
        rollback: True rolls back even if the status means success. False commits even if the status
            is 400 or above (to store a failed login, for example). An exception that leaves the
            application always rolls back.

    Raises:
        NoSession: The calling code does not run inside a unit of work.
        SessionClosed: The request that started this task has ended.
        ConfigurationError: `rollback` is neither True nor False.
    """
    if rollback is not True and rollback is not False:
        raise ConfigurationError("set_rollback takes True or False.")
    task = current_task()
    for unit in unit_to_decide().of_same_request():
        others = {each: value for each, value in unit.rollbacks.items() if each is not task}
        unit.is_used, unit.rollback, unit.rollbacks = True, rollback, {**others, task: rollback}


def take_decision(unit: UnitOfWork, task: object, *, of_ended_too: bool) -> bool | None:
    """Return the argument of the last `set_rollback` call of `task`, and forget the call.

    If `of_ended_too` is True, calls of worker threads and ended tasks count too. Their work is
    committed or rolled back together with the work of `task`.

    Returns:
        True to roll back, False to commit. None if `set_rollback` was not called.
    """
    taken = [
        each
        for each in unit.rollbacks
        if each is task or (of_ended_too and (each is None or has_ended(each)))
    ]
    decision = unit.rollbacks[taken[-1]] if taken else None
    unit.rollbacks = {each: value for each, value in unit.rollbacks.items() if each not in taken}
    unit.rollback = next(reversed(unit.rollbacks.values()), None)
    return decision


def unit_to_decide(*, also_at_end: bool = False) -> UnitOfWork:
    """Return the current unit of work, if it has not ended.

    Args:
        also_at_end: True to return the unit of work also while its last commit runs.

    Raises:
        NoSession: The calling code does not run inside a unit of work.
        SessionClosed: The request that started this task has ended.
    """
    unit = current_unit.get()
    if unit is None:
        raise NoSession("any database")
    # Raise SessionClosed if the unit of work is marked as closed. But its last COMMIT may still be
    # running, and a listener of the application may call `on_commit` there. In such a listener,
    # `current_end` has the running commit, so raise nothing.
    is_closed = unit.closed or (unit.joined is not None and unit.outermost.closed)
    if is_closed and not (also_at_end and current_end.get() and unit.outermost.sessions):
        raise SessionClosed("any database")
    return unit
