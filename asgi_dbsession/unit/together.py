"""Commits or rolls back the sessions of several databases, one after the other."""

from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeAlias

from asgi_dbsession.session.completion import call_here, complete_here
from asgi_dbsession.session.end import End
from asgi_dbsession.session.managed import ManagedSession, Sessions

from .unit_of_work import UnitOfWork

Run: TypeAlias = Callable[..., Coroutine[Any, Any, Any]]


async def end_together(sessions: Sessions, end: End) -> BaseException | None:
    """Commit or roll back several sessions, in the order of the list.

    All sessions are flushed before the first COMMIT. If a flush fails, all sessions are rolled
    back.

    Returns:
        The first error, or None.
    """
    # If all sessions have only read, commit or roll them back without a flush. If at least one has
    # written, do not end any session before all are flushed. A flush may call a listener of the
    # application, and the listener may write in a session that has only read until then.
    if all(each.ends_at_once(commit=end.commit) for each in sessions):
        sessions = [
            each for each in sessions if not each.end_at_once(commit=end.commit, close=end.close)
        ]
    if sessions and all(each.session is each.orm for each in sessions):
        # All sessions are sync sessions, which block their thread. So use one worker thread for all
        # of them, instead of changing the thread for each session.
        ending = _end_all(sessions, end, call_here)
        failure: BaseException | None = await sessions[0].run(complete_here, ending)
        return failure
    return await _end_all(sessions, end)


async def _end_all(sessions: Sessions, end: End, run: Run | None = None) -> BaseException | None:
    failure = await flush_all(sessions, end, run) if end.commit else None
    if not end.commit or failure is not None:
        return await roll_back_all(sessions, end, failure, run)
    return await commit_all(sessions, end, run)


async def flush_all(sessions: Sessions, end: End, run: Run | None = None) -> BaseException | None:
    """Flush the sessions one after the other. Return the first error, or None.

    `run` calls the method `flush` of each session. If `run` is None, the attribute `run` of the
    session does this.
    """
    end.needs_loop = run is None
    for each in sessions:
        try:
            await (run or each.run)(each.flush, end)
        except BaseException as error:
            if not isinstance(error, Exception):
                # This task was cancelled. Do not roll back this session: the worker thread may
                # still use the session, or has rolled it back already.
                sessions.remove(each)
            return error
    return None


async def roll_back_all(
    sessions: Sequence[ManagedSession[Any]],
    end: End,
    failure: BaseException | None,
    run: Run | None = None,
) -> BaseException | None:
    """Roll back the sessions one after the other, even if one rollback fails.

    Returns:
        The argument `failure`. If this is None, the first error of a rollback, or None.
    """
    for each in sessions:
        try:
            await (run or each.run)(each.end, end, False)
        except BaseException as error:
            failure = failure or error
    return failure


async def commit_all(sessions: Sessions, end: End, run: Run | None = None) -> BaseException | None:
    """Commit the sessions one after the other. If one COMMIT fails, roll back the rest."""
    for number, each in enumerate(sessions):
        try:
            await (run or each.run)(each.end, end, True)
        except BaseException as error:
            # This COMMIT has failed. Roll back the databases that come after it in the list. The
            # databases before it stay committed, because a COMMIT cannot be undone.
            return await roll_back_all(sessions[number + 1 :], end, error, run)
    return None


async def learn_positions(sessions: Iterable[ManagedSession[Any]]) -> None:
    """For each session that has used a primary with replicas, record the primary's WAL position.

    The client may have seen the data of the primary up to this position. So the next request of the
    client reads only from replicas that have reached this position.
    """
    for each in sessions:
        route = each.companion.route
        if route is not None and not each.has_work and route.work_ended():
            await each.run(route.learn)


def in_order(unit: UnitOfWork, working: Sessions) -> Sessions:
    """Return the sessions in the order in which their databases were declared."""
    sessions = [unit.sessions.get(each) for each in unit.databases]
    return [each for each in sessions if each is not None and each in working]
