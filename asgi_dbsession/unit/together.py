"""Commits or rolls back the sessions of several databases together."""

from typing import Any

from asgi_dbsession.session.lock import End
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.two_phases import log_decision, log_doubt, prepared

Sessions = list[ManagedSession[Any]]


async def end_together(sessions: Sessions, end: End) -> BaseException | None:
    """Commit or roll back several sessions, in the order of the list.

    Every session is flushed before the first COMMIT. If one flush fails, all sessions are rolled
    back.

    Returns:
        The first error; None if there was none.
    """
    failure = await _prepare_all(sessions, end) if end.commit else None
    if not end.commit or failure is not None:
        return await _roll_back_all(sessions, end, failure)
    if all(each.orm.twophase for each in sessions):
        return await _commit_prepared(sessions, end)
    return await _commit_all(sessions, end)


async def _prepare_all(sessions: Sessions, end: End) -> BaseException | None:
    for each in sessions:
        try:
            await each.run(each.prepare, end)
        except BaseException as error:
            if not isinstance(error, Exception):
                # Do not touch this session again: its thread is still running, or has rolled back
                # already.
                sessions.remove(each)
            return error
    return None


async def _roll_back_all(
    sessions: Sessions, end: End, failure: BaseException | None
) -> BaseException | None:
    for each in sessions:
        try:
            await each.run(each.end, end, False)
        except BaseException as error:
            failure = failure or error
    return failure


async def _commit_all(sessions: Sessions, end: End) -> BaseException | None:
    for number, each in enumerate(sessions):
        try:
            await each.run(each.end, end, True)
        except BaseException as error:
            # The databases before this one have committed already, and keep their work. Only
            # `two_phase` prevents this.
            return await _roll_back_all(sessions[number + 1 :], end, error)
    return None


async def _commit_prepared(sessions: Sessions, end: End) -> BaseException | None:
    """Commit prepared sessions. After a failure continue, because the decision to commit stands."""
    failure: BaseException | None = None
    transactions = [prepared(each.companion.connections) for each in sessions]
    log_decision(transactions)
    for each, transaction in zip(sessions, transactions, strict=True):
        try:
            await each.run(each.end, end, True)
        except BaseException as error:
            failure = failure or error
            log_doubt(transaction, error)
    return failure
