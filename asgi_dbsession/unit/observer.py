"""The interface for code that observes units of work without changing them."""

from typing import Any

from sqlalchemy import Engine

from asgi_dbsession.session.lock import End
from asgi_dbsession.session.managed import ManagedSession


class UnitObserver:
    """The base class of objects that are called at each event of a unit of work.

    The methods must be fast and must not raise. `unit` is a `UnitOfWork`, a class that this module
    cannot import.
    """

    def engine_used(self, engine: Engine) -> None:
        """Sessions use `engine` for the first time; called again if several databases share it."""

    def engine_left(self, engine: Engine) -> None:
        """This package stops using `engine`: remove your listeners from it."""

    def unit_began(self, unit: Any) -> None:
        """The unit of work began."""

    def session_opened(self, unit: Any, database: Any, opened: ManagedSession[Any]) -> None:
        """The unit of work opened its session of `database`."""

    def wait_failed(self, unit: Any, error: Exception) -> None:
        """No connection became free within the time limit of the pool."""

    def work_ended(self, unit: Any, end: End) -> None:
        """The work of the unit was committed or rolled back, and `on_commit` functions have run."""
