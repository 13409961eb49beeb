"""The public function `on_commit(function)`: `function` will be called after the next COMMIT."""

from contextlib import suppress
from inspect import iscoroutinefunction

from asgi_dbsession.errors import ConfigurationError, SessionClosed
from asgi_dbsession.session.end import current_end
from asgi_dbsession.session.tasks import current_task
from asgi_dbsession.unit.decisions import unit_to_decide

from .callback import AfterCommit, Function, refusal_to_await


def on_commit(function: Function) -> None:
    """Call a function after the current work was committed, and before the response is sent.

    The function is not called if the current work is rolled back. If the application itself calls
    `commit()`, the function is called when the unit of work ends.

    If a savepoint is open when `on_commit` is called, a rollback to this savepoint also drops the
    function. A rollback to a savepoint that begins after the call does not drop the function. So
    begin the savepoint, do the work, and then call `on_commit` before the savepoint ends.

    Functions are called in the order of their `on_commit` calls, even if the request is cancelled.
    If a function raises an exception, the logger `asgi_dbsession` logs it. The committed work stays
    stored, and the next functions are called.

    Each function runs in a new unit of work, with a new session. The work of this session is
    committed when the function returns. The function may call `on_commit` too.

    Args:
        function: A function without arguments. A coroutine function is awaited. A plain function is
            called on the event loop, or in a worker thread if a `def` handler called `on_commit`.

    Raises:
        NoSession: The calling code does not run inside a unit of work.
        SessionClosed: The request that started this task has ended.
        ConfigurationError: `function` is not a function. Or it is a coroutine function in a
            `SyncDatabase.begin()` block, where it cannot be awaited.
    """
    _check(function)
    unit = unit_to_decide(also_at_end=True)
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
        # Another thread has closed the unit of work meanwhile. If the function is still in the list
        # `callbacks`, the function will never be called, so raise an error.
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
