"""Commits or rolls back the sessions of several databases together."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeAlias

from asgi_dbsession.session.completion import call_here, complete_here
from asgi_dbsession.session.lock import End
from asgi_dbsession.session.managed import ManagedSession

from .unit_of_work import UnitOfWork

Sessions: TypeAlias = list[ManagedSession[Any]]
Run: TypeAlias = Callable[..., Awaitable[Any]]


async def end_together(sessions: Sessions, end: End) -> BaseException | None:
    """Commit or roll back several sessions, in the order of the list.

    Every session is flushed before the first COMMIT. If one flush fails, all sessions are rolled
    back.

    Returns:
        The first error; None if there was none.
    """
    if all(each.ends_at_once for each in sessions):
        return await _end_all(sessions, end, call_here)
    if all(each.session is each.orm for each in sessions):
        # All sessions are sync, and block. Run all of them in one worker thread, to change the
        # thread only once.
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
    """Flush the sessions in order, and stop at the first error.

    Args:
        sessions: The sessions to flush.
        end: The commit of the unit of work, for which the sessions are flushed.
        run: The function that calls `flush`, such as `call_here`; None to use `run` of the session.
    """
    for each in sessions:
        try:
            await (run or each.run)(each.flush, end)
        except BaseException as error:
            if not isinstance(error, Exception):
                # The task was cancelled. Do not roll back this session: its thread may still use
                # the session, or has rolled back already.
                sessions.remove(each)
            return error
    return None


async def roll_back_all(
    sessions: Sessions, end: End, failure: BaseException | None, run: Run | None = None
) -> BaseException | None:
    """Roll back all sessions in order, even if the rollback of a session fails."""
    for each in sessions:
        try:
            await (run or each.run)(each.end, end, False)
        except BaseException as error:
            failure = failure or error
    return failure


async def commit_all(sessions: Sessions, end: End, run: Run | None = None) -> BaseException | None:
    """Commit the sessions in order; after the first error, roll back the remaining sessions."""
    for number, each in enumerate(sessions):
        try:
            await (run or each.run)(each.end, end, True)
        except BaseException as error:
            # The databases earlier in the list have committed already, and keep their work. Only
            # `two_phase=True` prevents such a partial COMMIT.
            return await roll_back_all(sessions[number + 1 :], end, error, run)
    return None


async def learn_positions(sessions: Iterable[ManagedSession[Any]]) -> None:
    """Ask the primary for its WAL position, for each session with replicas whose work has ended.

    The client of the session may have seen data up to this position on the primary.
    """
    for each in sessions:
        route = each.companion.route
        if route is not None and not each.has_work and route.work_ended():
            await each.run(route.learn)


def in_order(unit: UnitOfWork, working: Sessions) -> Sessions:
    """Return the sessions in the order in which the databases of the unit were declared."""
    sessions = [unit.sessions.get(each) for each in unit.databases]
    return [each for each in sessions if each is not None and each in working]


def close_idle(opened: Iterable[ManagedSession[Any]]) -> tuple[Sessions, Exception | None]:
    """Close the sessions without work; return the other sessions, and the first exception."""
    working, raised = [], None
    for each in opened:
        try:
            if not each.close_if_idle():
                working.append(each)
        # A listener of the application raised the exception. The other sessions must end first.
        except Exception as error:
            raised = raised or error
    return working, raised
