"""The functions `set_rollback` and `on_commit`, which control the current unit of work."""

from contextlib import suppress
from inspect import isawaitable, iscoroutinefunction

from anyio import get_current_task

from asgi_dbsession.errors import ConfigurationError, NoSession, SessionClosed
from asgi_dbsession.session.lock import current_end, current_task

from .after_commit import AfterCommit, Function, refusal_to_await
from .unit_of_work import UnitOfWork, current_unit


def set_rollback(rollback: bool) -> None:
    """Decide how the current unit of work ends; the status of the response is then ignored.

    Args:
        rollback: True rolls back even after a success status. False commits even after a status of
            400 and above (to count a failed login, for example). If an exception leaves the
            application, the unit is always rolled back.

    Raises:
        NoSession: The caller is not inside a unit of work.
        SessionClosed: The request that this task belongs to has ended.
        ConfigurationError: `rollback` is neither True nor False.
    """
    if rollback is not True and rollback is not False:
        raise ConfigurationError("set_rollback takes True or False.")
    task = current_task()
    for unit in _unit().of_same_request():
        unit.is_used, unit.rollback, unit.rollback_set_by = True, rollback, task


def on_commit(function: Function) -> None:
    """Call a function after the current work is committed, and before the response is sent.

    The function is dropped if the current work is rolled back, by this package or by the
    application, completely or to a savepoint that was open at the call of `on_commit`. So call
    `on_commit` after the work. If the application commits itself, the function is called when the
    unit of work ends.

    Functions are called in order, and run to completion even if the request is cancelled. The
    logger `asgi_dbsession` logs an exception of a function: the COMMIT stays, and the next
    functions are called. Each function has a new unit of work. In the function, `get_session()`
    returns another session, which is committed when the function returns. The function may call
    `on_commit` too.

    Args:
        function: A function without arguments. A coroutine function is awaited. A plain function is
            called on the event loop, or in a worker thread if a `def` handler called `on_commit`.

    Raises:
        NoSession: The caller is not inside a unit of work.
        SessionClosed: The request that this task belongs to has ended.
        ConfigurationError: `function` is not a function, or is a coroutine function inside of
            `SyncDatabase.begin()`.
    """
    _check(function)
    unit = _unit(also_at_end=True)
    if unit.is_blocking and iscoroutinefunction(function):
        raise refusal_to_await(function)
    units = tuple(unit.of_same_request())
    databases = tuple(dict.fromkeys(each for unit in units for each in unit.databases))
    in_thread = not unit.is_blocking and _is_in_thread()
    read_only = any(each.read_only for each in units)
    callback = AfterCommit(function, databases, in_thread, current_task(), read_only)
    for each in units:
        # Copy the sessions: another thread may open a session, which changes the dictionary.
        for opened in tuple(each.sessions.values()):
            callback.attach(opened)
    outermost = units[-1]
    outermost.is_used = True
    outermost.callbacks.append(callback)
    if outermost.closed and not current_end.get():
        # Another thread has ended the unit. If the function is still in the list, nobody will call
        # the function, so raise an error.
        with suppress(ValueError):
            outermost.callbacks.remove(callback)
            raise SessionClosed("any database")


def _check(function: object) -> None:
    if isawaitable(function):
        raise ConfigurationError(
            "on_commit takes a function, and was given a coroutine: the function was called "
            "already. Write `on_commit(lambda: send_mail(order))`."
        )
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
    # During the last COMMIT of a unit, which counts as closed already, a listener may still call
    # `on_commit`. A task that the listener started may not.
    is_closed = unit.closed or (unit.joined is not None and unit.outermost.closed)
    if is_closed and not (also_at_end and current_end.get() and unit.outermost.sessions):
        raise SessionClosed("any database")
    return unit


def _is_in_thread() -> bool:
    """Return True if the caller runs in a worker thread of the event loop."""
    try:
        get_current_task()
    except RuntimeError:
        return True
    return False
