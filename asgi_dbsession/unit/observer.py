"""The interface for code that observes units of work without changing them."""

from typing import Any

from sqlalchemy import Engine

from asgi_dbsession.session.lock import End
from asgi_dbsession.session.managed import ManagedSession


class UnitObserver:
    """The base class of objects that are called at each event of a unit of work.

    The methods must be fast and must not raise. The argument `unit` is a `UnitOfWork`; its
    annotation is `Any`, because an import of the class `UnitOfWork` would be circular.
    """

    def engine_used(self, engine: Engine) -> None:
        """Called when a database begins to use `engine`; several databases may use one engine."""

    def engine_left(self, engine: Engine) -> None:
        """Called when this package stops using `engine`, so that you can remove your listeners."""

    def unit_began(self, unit: Any) -> None:
        """Called when a unit of work begins."""

    def session_opened(self, unit: Any, database: Any, opened: ManagedSession[Any]) -> None:
        """Called when a unit of work has opened its session of `database`."""

    def wait_failed(self, unit: Any, error: Exception) -> None:
        """Called when a session waited for a connection longer than the `pool_timeout`."""

    def work_ended(self, unit: Any, end: End) -> None:
        """Called after a commit or rollback of the unit, and after its `on_commit` functions."""
