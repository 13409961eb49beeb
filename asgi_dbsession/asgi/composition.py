"""Imports an optional subpackage (such as `retry`) only if an option of the middleware needs it."""

from collections.abc import Mapping
from typing import Any

from asgi_dbsession.types import ASGIApp
from asgi_dbsession.unit.observer import UnitObserver

from .arguments import AnyDatabase


def with_positions(serve: ASGIApp, databases: tuple[AnyDatabase, ...]) -> ASGIApp:
    """If a database has replicas, wrap `serve`: then each client reads its own writes.

    The wrapper, `Positions`, adds the WAL position (how far the primary has written its log) to the
    response. Without replicas, return `serve` itself.

    Responses that this package makes itself (503, for example) need the position too, because the
    request may have committed before its failure. So `serve` must already contain the code that
    makes these responses.
    """
    replica_sets = [each._replica_set for each in databases if each._replica_set is not None]
    if not replica_sets:
        return serve
    from asgi_dbsession.replicas.cookie import Positions

    return Positions(serve, replica_sets)


def with_optional_rooms(
    serve: ASGIApp, options: Mapping[str, Any]
) -> tuple[ASGIApp, tuple[UnitObserver, ...]]:
    """Wrap the application `serve` in the classes that the options need (retries, for example).

    Args:
        serve: The application.
        options: The databases and the checked options of `DBSessionMiddleware`, by name.

    Returns:
        A pair: (1) the ASGI application that serves HTTP requests, (2) the observers: objects that
        are notified when a unit of work (a request, for example) begins and ends.
    """
    observers: list[UnitObserver] = []
    if options["on_report"] is not None:
        from asgi_dbsession.reports.recorder import Recorder

        observers.append(Recorder(options["on_report"]))
    if options["retry_after"] is not None:
        from asgi_dbsession.retry.overload import Overload

        serve = overload = Overload(serve, options["retry_after"])
        observers.append(overload)
    serve = with_positions(serve, options["databases"])
    if options["attempts"] > 1:
        from asgi_dbsession.retry.retry import Retry

        serve = Retry(serve, options["attempts"], options["retry_on"])
    for observer in observers:
        for database in options["databases"]:
            database.observe(observer)
    return serve, tuple(observers)
