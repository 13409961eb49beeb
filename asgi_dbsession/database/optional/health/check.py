"""Checks a database and its replicas at the same time, for `database.health()`."""

import os
from dataclasses import replace
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

from anyio import create_task_group
from sqlalchemy.pool import QueuePool

from asgi_dbsession.database.arguments import check_number
from asgi_dbsession.database.engine_life import EngineLife
from asgi_dbsession.database.engines import sync_engine_of
from asgi_dbsession.database.health import Health
from asgi_dbsession.errors import DBSessionError

from .questions import TaskQuestions, ThreadQuestions

# For each database object: the object that sends a statement to check if the database answers. If
# several tasks or threads call `health()` at the same time, they share one such check.
_questions: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
# In a child process after a fork, forget the health checks that the parent is running. Their tasks
# and threads do not run in the child, so `health()` would never get an answer from them there.
# (Windows has no forks, and so no `os.register_at_fork`.)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_questions.clear)


async def health_of(database: EngineLife[Any], within: float) -> Health:
    """Return the health of a database, with the health of each of its replicas.

    Args:
        database: The database object, which need not be started.
        within: The time limit in seconds.

    Raises:
        ConfigurationError: `within` is not a number of seconds.
    """
    check_number("within", within, 0, seconds=True)
    if not database.replicas:
        return await _check(database, within)
    found: dict[Any, Health] = {}

    async def check(each: EngineLife[Any]) -> None:
        found[each] = await _check(each, within)

    async with create_task_group() as tasks:
        for each in (database, *database.replicas):
            tasks.start_soon(check, each)
    return replace(found[database], replicas=tuple(found[each] for each in database.replicas))


async def _check(database: EngineLife[Any], within: float) -> Health:
    # Import `failure_of`, which explains a failed check, before the database is checked. If the
    # process has opened too many files, the check fails, and a later import would fail too.
    from asgi_dbsession.database.optional.failures.explanation import failure_of

    start = perf_counter()
    try:
        answers = await _questions_of(database).answers(database.engine, within)
        reason = None if answers else f"{database} did not answer within {within:g} s"
    except DBSessionError as error:
        answers, reason = False, str(error)
    except Exception as error:
        answers, reason = False, str(failure_of(database, error))
    latency = perf_counter() - start if answers else None
    pool = sync_engine_of(database._engine).pool if database._engine is not None else None
    if not isinstance(pool, QueuePool):
        return Health(answers, latency, reason, None, None, None)
    overflow = max(0, pool.overflow())
    return Health(answers, latency, reason, pool.size(), pool.checkedout(), overflow)


def _questions_of(database: EngineLife[Any]) -> Any:
    kind = TaskQuestions if database.is_async else ThreadQuestions
    # `setdefault` is atomic, so callers of several threads get the same object.
    return _questions.setdefault(database, kind())
