"""Records the statements, COMMITs and ROLLBACKs of the sessions that use an engine."""

from collections.abc import Callable
from time import perf_counter
from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine
from sqlalchemy.engine.interfaces import Dialect

from asgi_dbsession.session.companion import Step

from .call_site import find_call_site, find_line
from .tally import FAILED, MOST_STEPS, condense

_watched: WeakSet[Dialect] = WeakSet()


def watch_usage(engine: Engine) -> None:
    """Start to record the operations of `engine`. A second call does nothing.

    This replaces methods of SQLAlchemy's dialect object. SQLAlchemy's events for connections could
    do the same, but would take three times as much time in each request.
    """
    dialect: Any = engine.dialect
    if dialect not in _watched:
        _watched.add(dialect)
        for name, wrap in _WRAPPERS.items():
            setattr(dialect, name, wrap(dialect, name))


def unwatch_usage(engine: Engine) -> None:
    """Stop recording the operations of `engine`."""
    if engine.dialect in _watched:
        _watched.discard(engine.dialect)
        for name in _WRAPPERS:
            delattr(engine.dialect, name)


# Each function below replaces a method of a dialect object. The original method is looked up at
# each call, because `testing.rolled_back()` changes the class of the dialect object.


def _executing(dialect: Any, name: str) -> Callable[..., None]:
    def execute(cursor: Any, statement: str, *values: Any) -> None:
        context: Any = values[-1]
        try:
            steps = context.root_connection.asgi_dbsession_steps
        except AttributeError:
            # No session uses this connection, so the statement is not recorded.
            getattr(type(dialect), name)(dialect, cursor, statement, *values)
            return
        # Use the SQL text before the values are known. In the final text, an `IN` list has as many
        # parameters as there are values, so the same statement would have many texts.
        compiled = context.compiled
        text = statement if compiled is None else compiled.string
        step: Step = ["statement", perf_counter(), None, find_line(), text]
        steps.append(step)
        if len(steps) > MOST_STEPS:
            condense(steps)
        try:
            getattr(type(dialect), name)(dialect, cursor, statement, *values)
        finally:
            step[2] = perf_counter()

    return execute


def _ending(dialect: Any, name: str) -> Callable[..., None]:
    kind = _kind(name)

    def end(connection: Any) -> None:
        try:
            steps = connection.asgi_dbsession_steps
        except AttributeError:
            steps = None
        # When a connection returns to the pool after COMMIT or ROLLBACK, the pool sends another
        # ROLLBACK. This is no work of the session, so do not record it.
        if steps is None:
            getattr(type(dialect), name)(dialect, connection)
            return
        step: Step = [kind, perf_counter(), None, find_call_site(), ""]
        steps.append(step)
        if len(steps) > MOST_STEPS:
            condense(steps)
        try:
            getattr(type(dialect), name)(dialect, connection)
            connection.asgi_dbsession_steps = None
        except BaseException:
            step[4] = FAILED
            raise
        finally:
            step[2] = perf_counter()

    return end


def _in_two_phases(dialect: Any, name: str) -> Callable[..., None]:
    def end_in_two_phases(connection: Any, *identity: Any, **options: Any) -> None:
        steps: list[Step] = getattr(connection, "asgi_dbsession_steps", [])
        place, start = len(steps), perf_counter()
        getattr(type(dialect), name)(dialect, connection, *identity, **options)
        # The call above may have added an SQL statement to `steps` (`PREPARE TRANSACTION`, for
        # example). The step for the call began earlier, so insert it before the statement.
        steps.insert(place, [_kind(name), start, perf_counter(), find_call_site(), ""])

    return end_in_two_phases


def _kind(name: str) -> str:
    return name.split("_")[1]


_WRAPPERS: dict[str, Callable[..., Callable[..., None]]] = {
    "do_execute": _executing,
    "do_executemany": _executing,
    "do_execute_no_params": _executing,
    "do_commit": _ending,
    "do_rollback": _ending,
    "do_prepare_twophase": _in_two_phases,
    "do_commit_twophase": _in_two_phases,
    "do_rollback_twophase": _in_two_phases,
}
