"""What others can learn of units of work without changing them."""

from typing import Any

from sqlalchemy import Engine

from asgi_dbsession.session.lock import End
from asgi_dbsession.session.managed import ManagedSession


class UnitObserver:
    """Told what happens to units of work and to their engines. Must be quick, and must not raise.

    `unit` is a `UnitOfWork`, which this module cannot import.

    Attributes:
        observes_inner: Whether it is told of the units of middlewares further in, too.
    """

    observes_inner: bool = False

    def engine_used(self, engine: Engine) -> None:
        """Sessions use an engine for the first time; more than once if several share it."""

    def unit_began(self, unit: Any) -> None:
        """A unit of work began."""

    def session_opened(self, unit: Any, database: Any, opened: ManagedSession[Any]) -> None:
        """The unit opened its session of a database."""

    def wait_failed(self, unit: Any, error: Exception) -> None:
        """No connection became free in time."""

    def work_ended(self, unit: Any, end: End) -> None:
        """All work so far was committed or rolled back, and `on_commit` functions were called."""
