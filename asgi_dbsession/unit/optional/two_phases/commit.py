"""Commits the sessions of one unit of work with a two-phase commit.

A crash may leave transactions prepared. The deciding session is prepared and committed first, and
rolled back last: if it is still prepared, an operator rolls back all, otherwise commits all.
"""

import logging
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.orm import Session
from typing_extensions import Self

from asgi_dbsession.errors import ConcurrentUse, ConfigurationError
from asgi_dbsession.session.end import End
from asgi_dbsession.session.managed import ManagedSession, Sessions
from asgi_dbsession.unit.together import commit_all, flush_all, roll_back_all
from asgi_dbsession.unit.unit_of_work import UnitOfWork

from .names import Names
from .session import TwoPhaseSession

S = TypeVar("S")
Prepared: TypeAlias = list[TwoPhaseSession[Any]]

_logger = logging.getLogger("asgi_dbsession")
_IN_DOUBT = (
    "In doubt: %s. This prepared transaction keeps its locks until somebody commits it or rolls it "
    "back."
)


def refuse_one_phase(databases: Sequence[Any]) -> None:
    """Raise an error if one of the databases does not support two-phase commit.

    Raises:
        ConfigurationError: The SQLAlchemy dialect of the database has no two-phase commit.
    """
    for database in databases:
        if database.url.get_dialect().do_begin_twophase is Dialect.do_begin_twophase:
            raise ConfigurationError(
                f"{database} cannot commit in two phases. Leave out `two_phase=True`, or give this "
                "database to a DBSessionMiddleware of its own without it."
            )


class TwoPhases:
    """Commits the sessions of one unit of work with a two-phase commit.

    The unit of work has this object as its attribute `two_phases`.

    Args:
        databases: How many databases the unit of work has.
    """

    def __init__(self, databases: int) -> None:
        self._names = Names(databases)

    def anew(self, databases: int) -> Self:
        """Return a new `TwoPhases` object, which commits another unit of work in two phases.

        Each function given to `on_commit` runs in a new unit of work. The transactions of the new
        unit of work must not get the same names as those of the outer unit of work.

        Args:
            databases: How many databases the new unit of work has.
        """
        return type(self)(databases)

    def manage(self, opened: ManagedSession[S]) -> ManagedSession[S]:
        """Return an object that can send PREPARE and COMMIT for the SQLAlchemy session in `opened`.

        The unit of work must use the returned object instead of `opened`, which cannot send
        PREPARE (the first phase of a two-phase commit).
        """
        return TwoPhaseSession(opened, self._names)

    async def commit(self, unit: UnitOfWork, sessions: Sessions, end: End) -> BaseException | None:
        """Flush all sessions, then send PREPARE, then COMMIT. Return the first error, or None.

        Each session stays locked from its flush until its COMMIT has ended. Other tasks cannot use
        the session meanwhile.
        """
        try:
            _add_deciding(self._names.deciding, unit, sessions)
        except ConcurrentUse as error:
            return await roll_back_all(sessions, end, error)
        failure = await flush_all(sessions, end)
        if failure is not None:
            return await roll_back_all(sessions, end, failure)
        if sum(len(each.companion.open_connections) for each in sessions) == 1:
            # For a single connection, a normal COMMIT is enough. Two phases would be slower, and
            # could leave the transaction prepared.
            return await commit_all(sessions, end)
        deciding = self._names.deciding
        prepared = [each for each in sessions if isinstance(each, TwoPhaseSession)]
        prepared.sort(key=lambda each: each.orm is not deciding)
        failure = await _prepare_all(prepared)
        if failure is not None:
            await _roll_back_prepared(prepared, end, failure)
        else:
            failure = await _commit_prepared(prepared, end)
        for each in prepared:
            if each.in_doubt and failure is not None:
                # These transactions may still be prepared on the servers. Log their names, because
                # an operator must commit them or roll them back.
                _logger.error(_IN_DOUBT, each.in_doubt, exc_info=failure)
                self._names.renew()
        return failure


def _add_deciding(deciding: Session | None, unit: UnitOfWork, sessions: Sessions) -> None:
    """Add the deciding session to `sessions`, even if it has no work.

    After a crash, the transaction of this session tells an operator what to do with the others.

    Raises:
        ConcurrentUse: The deciding session has uncommitted work of another task.
    """
    for each in unit.opened:
        if each.orm is deciding and each not in sessions and len(sessions) > 1:
            if each.has_work:
                raise ConcurrentUse(each.lock.database, mixed_with="living")
            sessions.append(each)


async def _prepare_all(sessions: Prepared) -> BaseException | None:
    for each in sessions:
        try:
            await each.run(each.prepare)
        except BaseException as error:
            return error
    return None


async def _roll_back_prepared(sessions: Prepared, end: End, failure: BaseException) -> None:
    deciding, *others = sessions
    await roll_back_all(others, end, failure)
    # If another transaction may still be prepared on its server, leave the first transaction
    # (`deciding`) prepared too. If an operator finds the first one prepared, the operator rolls
    # back the others. If the first one were gone, the operator would commit the others.
    if any(each.in_doubt for each in others):
        await deciding.run(deciding.leave_in_doubt, end)
    else:
        await roll_back_all([deciding], end, failure)


async def _commit_prepared(sessions: Prepared, end: End) -> BaseException | None:
    failure: BaseException | None = None
    deciding, *others = sessions
    try:
        await deciding.run(deciding.end, end, True)
    except BaseException as error:
        failure = error
    for each in others:
        # If nobody knows whether the first transaction (`deciding`) was committed, leave the others
        # prepared. An operator must find this out, and then commit or roll back the others.
        if deciding.in_doubt and failure is not None:
            await each.run(each.leave_in_doubt, end)
            continue
        try:
            await each.run(each.end, end, True)
        except BaseException as error:
            failure = failure or error
    return failure
