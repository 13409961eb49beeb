"""Imports the optional packages (such as `retry`) only if an option needs them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from asgi_dbsession.types import ASGIApp
from asgi_dbsession.unit.observer import UnitObserver
from asgi_dbsession.unit.report import UnitReport

from .answer import OnCommitError
from .arguments import AnyDatabase


def two_phase_commit(two_phase: bool, databases: int) -> Callable[[], Any] | None:
    """Return a function that makes the attribute `two_phases` of each unit of work, or None."""
    if not two_phase:
        return None
    from asgi_dbsession.unit.optional.two_phases.commit import TwoPhases

    return partial(TwoPhases, databases)


def with_positions(serve: ASGIApp, databases: tuple[AnyDatabase, ...]) -> ASGIApp:
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
    if retry_after is not None:
        from asgi_dbsession.retry.overload import Overload

        serve = overload = Overload(serve, retry_after)
        observers.append(overload)
    serve = with_positions(serve, databases)
    if attempts > 1:
        from asgi_dbsession.retry.retry import Retry

        serve = Retry(serve, attempts, retry_on)
    for observer in observers:
        for database in databases:
            database.observe(observer)
    return serve, tuple(observers)


def for_last_attempt(on_commit_error: OnCommitError, attempts: int) -> OnCommitError:
    """Return `on_commit_error`. If the request will be retried, the result sends no response."""
    if on_commit_error is None or attempts == 1:
        return on_commit_error
    from asgi_dbsession.retry.attempt import unless_retried

    return unless_retried(on_commit_error)
