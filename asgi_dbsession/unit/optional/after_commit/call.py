"""Calls the functions given to `on_commit` after a COMMIT."""

from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from asgi_dbsession.session.end import End
from asgi_dbsession.session.managed import Sessions
from asgi_dbsession.unit.current import current_unit
from asgi_dbsession.unit.shares import is_of
from asgi_dbsession.unit.unit_of_work import UnitOfWork

from .callback import AfterCommit

Close: TypeAlias = Callable[..., Awaitable[Any]]


async def call_after_commit(
    unit: UnitOfWork,
    end: End,
    given: Mapping[AfterCommit, bool],
    working: Sessions,
    *,
    close: Close,
) -> None:
    """Call each function given to `on_commit` if the work that it waits for was committed.

    `given` has the functions that were given before the commit `end` began. A function's value in
    `given` is True if the application's own `commit()` has committed this work. Such a function is
    called even if the commit `end` has failed. `close` ends the new unit of work in which a
    function runs.
    """
    for callback in _settle(unit.callbacks, end, given, working):
        await _call(unit, callback, close)


async def _call(unit: UnitOfWork, callback: AfterCommit, close: Close) -> None:
    """Call an `on_commit` function in a new unit of work. If the function fails, log the error."""
    inner = unit.within(callback.databases)
    inner.read_only, inner.is_blocking = callback.read_only, unit.is_blocking
    if unit.two_phases is not None:
        inner.two_phases = unit.two_phases.anew(len(inner.databases))
    token = current_unit.set(inner)
    try:
        try:
            if unit.is_blocking:
                callback.call_blocking()
            else:
                await callback.call()
        except BaseException as error:
            await close(inner, commit=False, error=error)
            raise
        await close(inner, commit=not inner.rollback)
    # A CancelledError can come only from the `on_commit` function itself, because nothing can
    # cancel this task now.
    except (Exception, CancelledError) as error:
        callback.log(error)
    finally:
        current_unit.reset(token)


def _settle(
    callbacks: list[AfterCommit],
    end: End,
    given: Mapping[AfterCommit, bool],
    working: Sessions,
) -> list[AfterCommit]:
    """Return the functions given to `on_commit` that must be called now.

    Each function waits for the work that was uncommitted when `on_commit` was called. If this work
    was committed, return the function. If this work was rolled back, drop the function. If this
    work is still uncommitted, keep the function in `callbacks`.
    """
    due: list[AfterCommit] = []
    for each in tuple(callbacks):
        # Do not call a function after this COMMIT if it was given to `on_commit` during this
        # COMMIT, or by another task that is still running. Keep it for a later COMMIT.
        is_concerned = each in given and is_of(each.given_by, end.task)
        # Decide now if the function is called or dropped, unless it also waits for the COMMIT of
        # other sessions. After the last COMMIT of the unit of work (`end.close`), always decide.
        ends = end.close or (is_concerned and not each.waits_for_others(working))
        if not (ends or each.committed or each.rolled_back):
            continue
        if given.get(each) or (end.succeeded and each.should_run(success=ends)):
            due.append(each)
        callbacks.remove(each)
        each.detach()
    return due
