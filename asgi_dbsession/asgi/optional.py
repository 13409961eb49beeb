"""Adds the optional rooms that a middleware asks for, and imports no other."""

from collections.abc import Callable
from typing import Any

from asgi_dbsession.types import ASGIApp
from asgi_dbsession.unit.observer import UnitObserver
from asgi_dbsession.unit.report import UnitReport

from .arguments import AnyDatabase


def with_optional_rooms(
    serve: ASGIApp,
    databases: tuple[AnyDatabase, ...],
    *,
    attempts: int,
    retry_on: Any,
    retry_after: int | None,
    on_report: Callable[[UnitReport], object] | None,
) -> tuple[ASGIApp, tuple[UnitObserver, ...]]:
    """Wrap `serve` in what was asked for, and have it observe units of work and their engines.

    Returns:
        What serves a request of HTTP, and who observes its units.
    """
    observers: list[UnitObserver] = []
    if on_report is not None:
        from asgi_dbsession.reports.recorder import Recorder

        observers.append(Recorder(on_report))
    if retry_after is not None:
        from asgi_dbsession.retry.overload import Overload

        overload = Overload(serve, retry_after)
        serve, observers = overload, [*observers, overload]
    if attempts > 1:
        from asgi_dbsession.retry.retry import Retry

        retry = Retry(serve, attempts, retry_on)
        serve, observers = retry, [*observers, retry]
    for observer in observers:
        for database in databases:
            database.watch_engines(observer.engine_used)
    return serve, tuple(observers)
