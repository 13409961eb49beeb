"""The base class for objects that are notified of each commit and rollback of a request."""

from typing import Any

from sqlalchemy import Engine

from asgi_dbsession.session.companion import Step
from asgi_dbsession.session.end import End
from asgi_dbsession.session.managed import ManagedSession


class UnitObserver:
    """An object that is notified when a unit of work begins, opens a session, and ends its work.

    A unit of work is one request or one `begin()` block. The methods must be fast and must not
    raise exceptions. The argument `unit` is a `UnitOfWork`. Its annotation is `Any`, because
    importing `UnitOfWork` here would be a circular import.
    """

    def engine_used(self, engine: Engine) -> None:
        """Called when a database starts to use `engine`. The observer can add listeners to it.

        If several databases use one engine, this method is called for each of them.
        """

    def engine_left(self, engine: Engine) -> None:
        """Called when no database uses `engine` any more. The observer must remove its listeners.

        This method is called only for an engine that the application has made (`from_engine`).
        """

    def unit_began(self, unit: Any) -> None:
        """Called when a unit of work begins, if this observer watches it from its beginning.

        An observer of a single database watches a unit of work only from the time when the unit of
        work opens its session of this database. Then this method is not called.
        """

    def session_opened(self, unit: Any, database: Any, opened: ManagedSession[Any]) -> None:
        """Called when a unit of work has opened its session of `database`."""

    def work_ended(self, unit: Any, end: End, steps: dict[Any, list[Step]]) -> None:
        """Called after each commit or rollback and its `on_commit` functions.

        Also called when a unit of work ends that has no work. `steps` has what each session did
        since the last call. Do not change its lists: all observers share them.
        """
