"""The options and methods that `AsyncDatabase` and `SyncDatabase` have in common."""

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Never, TypeVar

from sqlalchemy import URL, Engine
from sqlalchemy.exc import ArgumentError
from typing_extensions import Self

from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.types import Scope
from asgi_dbsession.unit.current import unit_that_manages
from asgi_dbsession.unit.observer import UnitObserver

from .arguments import check_flags
from .engine_life import E, EngineLife
from .engines import sync_engine_of
from .health import Health
from .options import checked_options, reads_of
from .replicas import Replicas
from .url import url_with_driver

S = TypeVar("S")
GivenOptions = TypeVar("GivenOptions", bound=Mapping[str, Any])


class Database(EngineLife[E], Generic[E, S, GivenOptions]):
    """The methods that `AsyncDatabase` and `SyncDatabase` have in common."""

    # The class of the sessions, a subclass of SQLAlchemy's `Session`. For an async database, it is
    # the class of the `Session` inside each `AsyncSession`.
    _orm_class: type[Any]
    # The class of the replicas: `AsyncDatabase` or `SyncDatabase`, and not a subclass of them.
    _kind: type[Any]
    observers: tuple[UnitObserver, ...] = ()

    def __init__(
        self,
        url: str | URL,
        *,
        session_options: GivenOptions | None = None,
        ping_on_startup: bool = True,
        on_engine: Callable[[Engine], object] | None = None,
        autocommit_reads: bool | None = None,
        replicas: Sequence[str | URL] | Replicas = (),
        **engine_options: Any,
    ) -> None:
        super().__init__(url, engine_options, ping_on_startup, on_engine)
        self._reads = reads_of(self, autocommit_reads, self.url.get_dialect().driver)
        self._session_options = checked_options(session_options, engine_options)
        self._take_session_classes()
        try:
            self._make_session(None)
        except (TypeError, AttributeError, ArgumentError) as error:
            raise ConfigurationError(
                f"{self} cannot make a session with these session options: {error}"
            ) from error
        # Do not write `if replicas:` here. `ReplicaSet` must get None and "" too, to refuse them.
        if replicas not in ((), []):
            from asgi_dbsession.replicas.replica_set import ReplicaSet
            from asgi_dbsession.replicas.route import routed_class

            options = {"on_engine": on_engine, **engine_options}
            self._replica_set = ReplicaSet(self, self._kind, url, replicas, options)
            self._orm_class = routed_class(self._orm_class)

    @abstractmethod
    def _take_session_classes(self) -> None:
        """Set the session classes, and `_kind`."""

    @classmethod
    def from_env(cls, variable: str = "DATABASE_URL", **options: Any) -> Self:
        """Make a database object from the URL in an environment variable.

        Args:
            variable: The name of the environment variable.
            **options: The same keyword arguments as for the class itself.

        Raises:
            ConfigurationError: The environment variable is not set, or its value is not a usable
                URL.
        """
        url = os.environ.get(str(variable))
        if not url:
            from .optional.mistakes import no_variable

            raise no_variable(str(variable), cls.__name__)
        try:
            url_with_driver(url, asynchronous=cls.is_async)
        except ConfigurationError as error:
            raise ConfigurationError(f"Wrong value of {variable}: {error}") from error
        return cls(url, **options)

    @classmethod
    def from_engine(
        cls,
        engine: E,
        *,
        session_options: Any = None,
        ping_on_startup: bool = True,
        **unknown: Never,
    ) -> Self:
        """Make a database object that uses an existing engine, and never disposes this engine.

        The database object can be used without a call of `startup()`. This package adds
        listeners to the engine. The listeners are removed when the last database object with this
        engine is garbage collected. An async engine belongs to the event loop that uses it first.
        If this loop was closed, the next loop that uses the engine gets new connections. If several
        loops use the engine at the same time, the engine needs `poolclass=NullPool`.

        Args:
            engine: An `AsyncEngine` for `AsyncDatabase`, an `Engine` for `SyncDatabase`.
            session_options: The same dictionary as for `AsyncDatabase(...)` or `SyncDatabase(...)`.
            ping_on_startup: True if `startup()` must fail when the database does not answer.
                `DBSessionMiddleware` calls `startup()` when the server starts.
            **unknown: Any other argument is refused.

        Raises:
            ConfigurationError: `engine` is not an engine, or is of the wrong kind (async or sync),
                or another argument is wrong.
        """
        from .optional.borrowed.database import database_of

        options = {"session_options": session_options, "ping_on_startup": ping_on_startup}
        made: Self = database_of(engine, cls, unknown, **options)
        return made

    @property
    def position(self) -> str | None:
        """Which changes the current client has seen, as a position in the log (WAL) of the primary.

        Read this property after a `begin()` block or in an `on_commit` function, and send its value
        in a message to a worker. In the worker, `begin(read_only=True, after=position)` sees all
        changes that the client has seen, even on a replica. The value is None if the client has not
        used the database yet, and always None without replicas.
        """
        return self._replica_set.position if self._replica_set is not None else None

    async def health(self, *, within: float = 1) -> Health:
        """Check if the database answers within a time limit, for a path such as `/health`.

        If the pool has no free connection or the server cannot be reached, the result says so, and
        no exception is raised. Calls at the same time share one check. A blocking driver cannot be
        stopped, so a check that takes too long goes on in its thread. If three such checks still
        run, no new check is started.

        Args:
            within: The time limit in seconds.

        Returns:
            The health of the database. Its attribute `replicas` has the health of each replica,
            which is checked at the same time. `answers` is about the primary alone.

        Raises:
            ConfigurationError: `within` is not a number of seconds.
        """
        from .optional.health.check import health_of

        return await health_of(self, within)

    def get_session(self) -> S:
        """Return the session of this database in the current unit of work.

        The session is opened on first use, and its first statement checks out a connection of the
        pool. The session is closed permanently when the request or the `begin()` block ends.

        Raises:
            NoSession: The calling code runs neither in a request that uses this database, nor in a
                `begin()` block of this database.
            SessionClosed: The request that started this task has ended.
            DatabaseNotRunning: The database has not been started.
        """
        return unit_that_manages(self).open(self)

    async def session_dependency(self) -> S:
        """Return the session of `get_session()`, for `Depends` (FastAPI) or `Provide` (Litestar).

        This is a coroutine function, because frameworks run plain functions in a thread. It has no
        parameters, because frameworks would fill parameters with values from the URL.
        """
        return self.get_session()

    def open_session(self, scope: Scope | None, *, read_only: bool) -> ManagedSession[S]:
        """Open a session for a unit of work. Applications use `get_session` or `begin` instead."""
        engine: E | None = self.engine
        replica_set = None if self._reads.is_shared else self._replica_set
        made = self._make_session(None if replica_set is not None and read_only else engine)
        made.orm.info["scope"] = scope
        if replica_set is not None:
            replica_set.give_route(made)
        if read_only:
            from asgi_dbsession.session.optional.read_only.refusals import Refusals

            made.companion.read_only = Refusals(made.companion)
        return made

    @abstractmethod
    def _make_session(self, engine: E | None) -> ManagedSession[S]: ...

    def add_observer(self, observer: UnitObserver) -> None:
        """Add an observer: call its methods for each unit of work that uses this database.

        Args:
            observer: An object with the methods of `UnitObserver`. If the database is running now,
                the method `engine_used` of the object is called at once.
        """
        self.observers = (*self.observers, observer)
        self.observe(observer)

    def observe(self, observer: UnitObserver) -> None:
        """Tell an observer about each engine that this database or one of its replicas uses.

        An observer is an object that is notified of units of work, for reports for example.
        """
        self._observers.append(observer)
        if self._engine is not None:
            observer.engine_used(sync_engine_of(self._engine))
        for each in self.replicas:
            each.observe(observer)

    def _see(self, position: str | None, *, join: bool, read_only: bool) -> None:
        check_flags(join=join, read_only=read_only)
        if position is not None:
            from asgi_dbsession.replicas.seen_here import see

            see(self._replica_set, position, join=join, read_only=read_only)
