"""Commits or rolls back the work of a unit of work: all of it, or only the work of one task."""

from collections.abc import Coroutine
from typing import Any

from asgi_dbsession.session.companion import Step
from asgi_dbsession.session.completion import run_to_completion
from asgi_dbsession.session.end import End, Reason, current_end
from asgi_dbsession.session.managed import Sessions

from .decisions import take_decision
from .shares import Living, find_failed, is_of, sort_work
from .together import end_together, in_order, learn_positions, roll_back_all
from .unit_of_work import UnitOfWork


def end_work(unit: UnitOfWork, *, commit: bool) -> Coroutine[Any, Any, None]:
    """Commit or roll back all work of the unit of work. Its sessions stay usable.

    The caller must not cancel this coroutine; see `run_to_completion`.

    Raises:
        Exception: The error of the flush or of COMMIT. `unit.failure` has the same error.
    """
    end = End(commit, "status" if unit.rollback is None else "set_rollback")
    unit.forget_decisions()
    return _end(unit, end, unit.with_work(), ended=())


def end_reads(unit: UnitOfWork, *, commit: bool) -> bool:
    """Commit or roll back without an `await`, if the only session of a unit of work has only read.

    The reads were sent without BEGIN, so neither COMMIT nor ROLLBACK must be sent.

    Returns:
        True if the session was committed or rolled back. False if nothing was done, so that the
        caller must call `end_work`.
    """
    opened = unit.opened
    if len(opened) != 1 or unit.callbacks or unit.observers or unit.is_routed:
        return False
    if not opened[0].end_at_once(commit=commit):
        return False
    unit.forget_decisions()
    return True


async def end_work_of(
    task: object, unit: UnitOfWork, *, commit: bool, living: Living, ended: tuple[Any, ...] = ()
) -> None:
    """Commit or roll back the work of `task` before `task` sends or waits for an ASGI message.

    During the commit, a listener of the application may use further sessions. Then this function
    calls itself to commit these too. In this second call, `ended` has the sessions to leave out,
    because the first call has committed them already.

    Raises:
        ConcurrentUse: Another task has uncommitted work in the same transaction.
    """
    working = [each for each in unit.with_work() if each not in ended]
    if not (working or unit.rollbacks or unit.callbacks):
        return
    own, failed = sort_work(unit, working, task, living) if working else ([], [])
    reason: Reason = "status"
    # If the application has called `set_rollback`, do what it has decided, and ignore the argument
    # `commit`. But another running task may use all sessions that have work, so that none can be
    # committed now. Then keep the decision for the later commit of these sessions.
    if unit.rollbacks and (own or not working or living == "refuse"):
        rollback = take_decision(unit, task, of_ended_too=bool(own) or not working)
        if rollback is not None:
            commit, reason = not rollback, "set_rollback"
    end = End(commit, reason, task=task)
    try:
        for each in own:
            each.lock.reserve_for(end)
        if failed:
            await run_to_completion(_end(unit, End(commit=False, reason="exception"), failed))
        if own or any(is_of(each.given_by, task) for each in unit.callbacks):
            await run_to_completion(_end(unit, end, own))
    finally:
        for each in own:
            each.lock.cancel_reservation(end)
    # During the commit, a listener of the application may have begun work in another database (to
    # store an audit row). Commit this work too, before the message is sent.
    if own and len(unit.databases) > 1:
        await end_work_of(task, unit, commit=commit, living=living, ended=(*ended, *own))


async def close(
    unit: UnitOfWork,
    *,
    commit: bool,
    error: BaseException | None = None,
    sort_tasks: bool = False,
) -> None:
    """Commit or roll back all work of a unit of work, and close its sessions permanently.

    `error` is the exception of the application, if any. With `sort_tasks`, the work of failed tasks
    is rolled back even if `commit` is True.
    """
    unit.closed = True
    try:
        opened = unit.opened
        if (
            unit.is_answered
            and not commit
            and _reason_to_roll_back(error, unit.rollback) in ("cancelled", "unfinished")
        ):
            from .optional.unsaved import log_unsaved

            log_unsaved(unit, opened)
        working = [each for each in opened if not each.close_if_idle()]
        failed: Sessions = []
        if working and commit and sort_tasks:
            commit, failed = find_failed(unit, working)
        # Make the `End` objects here, in the calling task. An `End` object stores the current task
        # and exception, and `_close_working` may run in another task.
        if working or unit.callbacks or unit.is_routed:
            end, rollback = _last_end(unit, commit, error), End(commit=False, reason="exception")
            ending = _close_working(unit, working, end, failed, rollback)
            await (ending if unit.is_blocking else run_to_completion(ending))
        elif unit.observers:
            _tell(unit, _last_end(unit, commit, error))
    except BaseException:
        await _close_left(unit)
        raise
    finally:
        unit.sessions.clear()


async def _close_left(unit: UnitOfWork) -> None:
    """Roll back and close the sessions that are still open after an exception in `close`.

    A signal handler may raise such an exception. An SQLAlchemy listener of the application may do
    so too, if it is called when an ORM object is removed from its session.
    """
    left = [each for each in unit.opened if not each.lock.is_closed]
    if left:
        ending = roll_back_all(left, End(commit=False, reason="exception", close=True), None)
        await (ending if unit.is_blocking else run_to_completion(ending))


async def _close_working(
    unit: UnitOfWork, working: Sessions, end: End, failed: Sessions, rollback: End
) -> None:
    """Commit or roll back the sessions in `working` (those that have work), and close them.

    Those in `failed`, which only failed tasks have used, are rolled back in any case.
    """
    failure: BaseException | None = None
    if failed:
        try:
            await _end(unit, rollback, failed)
        except BaseException as error:
            failure, end.commit = error, False
        last = End(commit=False, reason="exception", close=True)
        failure = await roll_back_all(failed, last, failure)
    await _end(unit, end, [each for each in working if each not in failed])
    if failure is not None:
        raise failure


async def _end(
    unit: UnitOfWork, end: End, working: Sessions, *, ended: tuple[Any, ...] | None = None
) -> None:
    """Commit or roll back the sessions `working`. Then call functions given to `on_commit`.

    During the flush, a listener of the application may use further sessions. If `ended` is a tuple,
    commit or roll back these sessions too, except those in `ended`. If `ended` is None, leave them
    to the caller.
    """
    # Record for each function given to `on_commit` if the application has already committed, with
    # its own `commit()`, the work that the function waits for. Such a function is called even if
    # the COMMIT that follows now fails.
    given = {each: each.committed for each in tuple(unit.callbacks)}
    end.had_work = bool(working)
    token = current_end.set(end)
    try:
        if unit.two_phases is not None and not unit.read_only and end.commit and working:
            end.failure = await unit.two_phases.commit(unit, in_order(unit, working), end)
        elif len(working) == 1:
            only = working[0]
            if not only.end_at_once(commit=end.commit, close=end.close):
                await only.run(only.end, end, end.commit)
        elif working:
            end.failure = await end_together(in_order(unit, working), end)
    except BaseException as error:
        end.failure = error
    finally:
        current_end.reset(token)
    if unit.is_routed:
        await learn_positions(unit.opened)
    if isinstance(end.failure, Exception):
        unit.failure = unit.failure or end.failure
    if unit.callbacks:
        from .optional.after_commit.call import call_after_commit

        await call_after_commit(unit, end, given, working, close=close)
    _tell(unit, end)
    if end.failure is not None:
        raise end.failure
    # During the flush, a listener of the application may have begun work in another database (to
    # store an audit row, for example). End this work too, before the response is sent.
    if ended is not None and len(unit.databases) > 1:
        ended = (*ended, *working)
        late = [each for each in unit.with_work() if each not in ended]
        if late:
            await _end(unit, End(end.commit, end.reason), late, ended=ended)


def _tell(unit: UnitOfWork, end: End) -> None:
    if not unit.observers:
        return
    steps: dict[Any, list[Step]] = {}
    for database, opened in tuple(unit.sessions.items()):
        companion = opened.companion
        if companion.recording is not None:
            done = companion.recording.take(companion.open_connections)
            if done:
                steps[database] = done
    for observer in unit.observers:
        observer.work_ended(unit, end, steps)


def _last_end(unit: UnitOfWork, commit: bool, error: BaseException | None) -> End:
    return End(commit, _reason_to_roll_back(error, unit.rollback), close=True, error=error)


def _reason_to_roll_back(error: BaseException | None, rollback: bool | None) -> Reason:
    if error is None:
        return "set_rollback" if rollback else "unfinished"
    raised = (Exception, BaseExceptionGroup, KeyboardInterrupt, SystemExit)
    return "exception" if isinstance(error, raised) else "cancelled"
