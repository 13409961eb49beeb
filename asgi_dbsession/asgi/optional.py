"""Imports the optional packages (such as `retry`) only if an option needs them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from asgi_dbsession.types import ASGIApp
from asgi_dbsession.unit.observer import UnitObserver
from asgi_dbsession.unit.report import UnitReport
from asgi_dbsession.unit.two_phases import TwoPhaseCommit

from .answer import serve_and_answer
from .arguments import AnyDatabase


def two_phase_commit(two_phase: bool, databases: int) -> Callable[[], TwoPhaseCommit] | None:
    """Return a function that makes the attribute `two_phases` of each unit of work, or None."""
    if not two_phase:
        return None
    from asgi_dbsession.two_phases.commit import TwoPhases

    return partial(TwoPhases, databases)


def with_answers(
    serve: ASGIApp,
    databases: tuple[AnyDatabase, ...],
    on_commit_error: Callable[[Exception], ASGIApp | None] | None,
) -> ASGIApp:
    """Wrap `serve`, so that a failed COMMIT is answered, and each client reads its own writes."""
    return _with_positions(partial(serve_and_answer, serve, on_commit_error), databases)


def _with_positions(serve: ASGIApp, databases: tuple[AnyDatabase, ...]) -> ASGIApp:
    """Wrap `serve` so that each client reads its own writes, if a database has replicas.

    The class `Positions` stores the WAL position that each client has seen. It must get all
    responses of this package too, because a request may have committed before its COMMIT failed.
    Without replicas, return `serve` itself.
    """
    servers = [each._replica_set for each in databases if each._replica_set is not None]
    if not servers:
        return serve
    from asgi_dbsession.replicas.cookie import Positions

    return Positions(serve, servers)


def with_optional_rooms(
    serve: ASGIApp,
    databases: tuple[AnyDatabase, ...],
    *,
    attempts: int,
    retry_on: Any,
    retry_after: int | None,
    on_commit_error: Callable[[Exception], ASGIApp | None] | None,
    on_report: Callable[[UnitReport], object] | None,
) -> tuple[ASGIApp, tuple[UnitObserver, ...]]:
    """Wrap `serve` in the optional packages that the options of the middleware need.

    Returns:
        A pair: (1) the ASGI application that serves HTTP requests, (2) the objects that observe its
        units of work.
    """
    observers: list[UnitObserver] = []
    if on_report is not None:
        from asgi_dbsession.reports.recorder import Recorder

        observers.append(Recorder(on_report))
    if attempts > 1 and on_commit_error is not None:
        from asgi_dbsession.retry.attempt import unless_retried

        on_commit_error = unless_retried(on_commit_error)
    serve = partial(serve_and_answer, serve, on_commit_error)
    if retry_after is not None:
        from asgi_dbsession.retry.overload import Overload

        serve = overload = Overload(serve, retry_after)
        observers.append(overload)
    serve = _with_positions(serve, databases)
    if attempts > 1:
        from asgi_dbsession.retry.retry import Retry

        serve = Retry(serve, attempts, retry_on)
    for observer in observers:
        for database in databases:
            database.observe(observer)
    return serve, tuple(observers)
