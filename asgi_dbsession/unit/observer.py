"""The base class for objects that watch units of work, such as reports and the live page."""

from typing import Any

from sqlalchemy import Engine

from asgi_dbsession.session.lock import End
from asgi_dbsession.session.managed import ManagedSession


class UnitObserver:
    """The base class of objects that are notified of each event of a unit of work.

    The methods must be fast and must not raise exceptions. The argument `unit` is a `UnitOfWork`.
    Its annotation is `Any`, because importing `UnitOfWork` here would be a circular import.
    """

    def engine_used(self, engine: Engine) -> None:
        """Called when a database starts to use `engine`. Several databases may use one engine."""

    def engine_left(self, engine: Engine) -> None:
        """Called when no database uses `engine` any more: remove your listeners from it."""

    def unit_began(self, unit: Any) -> None:
        """Called when a unit of work begins, for example at the start of a request."""

    def session_opened(self, unit: Any, database: Any, opened: ManagedSession[Any]) -> None:
        """Called when a unit of work has opened its session of `database`."""

    def wait_failed(self, unit: Any, error: Exception) -> None:
        """Called if a session got no connection within `pool_timeout`, with the error."""

    def work_ended(self, unit: Any, end: End) -> None:
        """Called after each commit or rollback, and after the `on_commit` functions."""
