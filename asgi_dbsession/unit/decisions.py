"""What an application tells its unit of work: how to end, and what to do afterwards."""

from contextlib import suppress
from inspect import isawaitable, iscoroutinefunction

from anyio import get_current_task

from asgi_dbsession.errors import ConfigurationError, NoSession, SessionClosed
from asgi_dbsession.session.lock import current_end, current_task

from .after_commit import AfterCommit, Function, refusal_to_await
from .unit_of_work import UnitOfWork, current_unit


def set_rollback(rollback: bool) -> None:
    """Decide how the current unit of work ends, whatever the status of the response says.

    Args:
        rollback: True rolls back also on success. False commits also on a status of 400 and above
            (to count a failed login, say). An exception that nobody turns into a response rolls
            back in any case.

    Raises:
        NoSession: No unit of work is open here.
        SessionClosed: The request that this task belongs to has ended.
        ConfigurationError: `rollback` is neither True nor False.
    """
    if rollback is not True and rollback is not False:
        raise ConfigurationError("set_rollback takes True or False.")
    task = current_task()
    for unit in _unit().of_same_request():
        unit.is_used, unit.rollback, unit.rollback_set_by = True, rollback, task


def on_commit(function: Function) -> None:
    """Call a function once the work of the current unit is stored, before the response is sent.

    It is dropped if that work is rolled back: by the application too, and also if only to a
    savepoint that was open when the function was given. So give it after the work it belongs to.
    If the application commits by itself, it is called when the unit of work ends.

    Functions are called in order, and run to completion also if the request is cancelled. What one
    raises is logged by the logger `asgi_dbsession`: the COMMIT stays, and the other functions are
    called. Each has a unit of work of its own: `get_session()` is another session there, committed
    when the function returns, and followed by the functions that it gives to `on_commit` itself.

    Args:
        function: Takes no arguments. A coroutine function is awaited. A plain function is called
            where it was given: on the event loop or, by a `def` handler, in a worker thread.

    Raises:
        NoSession: No unit of work is open here.
        SessionClosed: The request that this task belongs to has ended.
        ConfigurationError: It cannot be called; or it is a coroutine function, and the unit is
            `SyncDatabase.begin()`.
    """
    _check(function)
    unit = _unit(also_at_end=True)
    if unit.is_blocking and iscoroutinefunction(function):
        raise refusal_to_await(function)
    units = tuple(unit.of_same_request())
    databases = tuple(dict.fromkeys(each for unit in units for each in unit.databases))
    in_thread = not unit.is_blocking and _is_in_thread()
    callback = AfterCommit(function, databases, in_thread, current_task())
    for each in units:
        for opened in tuple(each.sessions.values()):  # a thread may open another one meanwhile
            callback.attach(opened)
    outermost = units[-1]
    outermost.is_used = True
    outermost.callbacks.append(callback)
    if outermost.closed and not current_end.get():
        # Another thread has ended the unit. If it has not called the function, nobody will.
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
    # A listener of its last flush may; a task that such a listener has started may not.
    is_closed = unit.closed or (unit.joined is not None and unit.outermost.closed)
    if is_closed and not (also_at_end and current_end.get() and unit.outermost.sessions):
        raise SessionClosed("any database")
    return unit


def _is_in_thread() -> bool:
    """Whether the caller runs in a worker thread of the event loop."""
    try:
        get_current_task()
    except RuntimeError:
        return True
    return False
