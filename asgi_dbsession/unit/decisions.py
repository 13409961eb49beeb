"""The functions `set_rollback` and `on_commit`, by which code controls the current unit of work."""

from contextlib import suppress
from inspect import iscoroutinefunction

from asgi_dbsession.errors import ConfigurationError, NoSession, SessionClosed
from asgi_dbsession.session.end import current_end
from asgi_dbsession.session.tasks import current_task, has_ended

from .after_commit import AfterCommit, Function, refusal_to_await
from .unit_of_work import UnitOfWork, current_unit


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
    for unit in _unit().of_same_request():
        others = {each: value for each, value in unit.rollbacks.items() if each is not task}
        unit.is_used, unit.rollback, unit.rollbacks = True, rollback, {**others, task: rollback}


def take_decision(unit: UnitOfWork, task: object, *, has_work: bool) -> bool | None:
    """Return the value that `set_rollback` was called with for the work of `task`, and forget it.

    Args:
        unit: The unit of work.
        task: The task that is about to send a message or to wait for a message.
        has_work: True if `task` has work, or if no task has work. Then calls of worker threads, and
            of tasks that have ended, count as calls of `task`.

    Returns:
        None if `set_rollback` was not called for the work of `task`.
    """
    taken = [
        each
        for each in unit.rollbacks
        if each is task or (has_work and (each is None or has_ended(each)))
    ]
    decision = unit.rollbacks[taken[-1]] if taken else None
    unit.rollbacks = {each: value for each, value in unit.rollbacks.items() if each not in taken}
    unit.rollback = next(reversed(unit.rollbacks.values()), None)
    return decision


def forget_decisions(unit: UnitOfWork) -> None:
    """Forget all calls of `set_rollback`, so that they do not apply to later work."""
    unit.rollback, unit.rollbacks = None, {}


def on_commit(function: Function) -> None:
    """Call a function after the current work was committed, and before the response is sent.

    The function is not called if the current work is rolled back, by this package or by the
    application. If a savepoint is open when `on_commit` is called, a rollback to this savepoint
    also drops the function. So do the work first, and then call `on_commit` inside the same
    savepoint. If the application itself calls `commit()`, the function is called when the unit of
    work ends.

    Functions are called in the order of their `on_commit` calls. They run to the end even if the
    request is cancelled. If a function raises an exception, the logger `asgi_dbsession` logs it;
    the committed work stays stored, and the next functions are called.

    Each function runs in a new unit of work. So `get_session()` returns a new session in the
    function, and the work of this session is committed when the function returns. The function may
    call `on_commit` too.

    Args:
        function: A function without arguments. A coroutine function is awaited. A plain function is
            called on the event loop, or in a worker thread if a `def` handler called `on_commit`.

    Raises:
        NoSession: The calling code does not run inside a unit of work.
        SessionClosed: The request that started this task has ended.
        ConfigurationError: `function` is not a function, or it is a coroutine function in a
            `SyncDatabase.begin()` block, where it cannot be awaited.
    """
    _check(function)
    unit = _unit(also_at_end=True)
    if unit.is_blocking and iscoroutinefunction(function):
        raise refusal_to_await(function)
    units = tuple(unit.of_same_request())
    databases = tuple(dict.fromkeys(each for unit in units for each in unit.databases))
    read_only = any(each.read_only for each in units)
    callback = AfterCommit(function, databases, current_task(), read_only)
    for each in units:
        for opened in each.opened:
            callback.attach(opened)
    outermost = units[-1]
    outermost.is_used = True
    outermost.callbacks.append(callback)
    if outermost.closed and not current_end.get():
        # Another thread has closed the unit of work during this call. If the function is still in
        # the list of callbacks, it will never be called. So remove it, and raise an error.
        with suppress(ValueError):
            outermost.callbacks.remove(callback)
            raise SessionClosed("any database")


def _check(function: object) -> None:
    if not callable(function):
        raise ConfigurationError(
            f"on_commit takes a function, and was given something of type "
            f"{type(function).__name__}. If you called the function yourself, write "
            "`on_commit(lambda: send_mail(order))`."
        )


def _unit(*, also_at_end: bool = False) -> UnitOfWork:
    unit = current_unit.get()
    if unit is None:
        raise NoSession("any database")
    # A listener of the application may call `on_commit` during the last COMMIT of a unit of work,
    # although this unit of work counts as closed already. A task that outlives the request may not
    # call it, because no COMMIT follows.
    is_closed = unit.closed or (unit.joined is not None and unit.outermost.closed)
    if is_closed and not (also_at_end and current_end.get() and unit.outermost.sessions):
        raise SessionClosed("any database")
    return unit
