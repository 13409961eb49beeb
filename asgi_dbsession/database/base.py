"""The base class of `AsyncDatabase` and `SyncDatabase`."""

import os
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from typing_extensions import Self

from asgi_dbsession.errors import ConfigurationError, kind_of
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.reads import reads_of
from asgi_dbsession.types import Scope
from asgi_dbsession.unit.observer import UnitObserver
from asgi_dbsession.unit.unit_of_work import unit_that_manages

from .arguments import check_number
from .engines import sync_engine_of
from .health import Health
from .replicated import ReplicatedLife
from .url import url_with_driver

E = TypeVar("E", bound=Engine | AsyncEngine)
S = TypeVar("S")


class Database(ReplicatedLife[E], Generic[E, S]):
    """The methods that `AsyncDatabase` and `SyncDatabase` have in common."""

    _engine_class: type[E]

    def __init__(
        self,
        url: str | URL,
        session_options: Mapping[str, Any] | None,
        ping_on_startup: bool,
        autocommit_reads: bool | None,
        engine_options: dict[str, Any],
        *,
        on_engine: Callable[[Engine], object] | None,
    ) -> None:
        super().__init__(url, ping_on_startup, on_engine, engine_options)
        self._reads = reads_of(self, autocommit_reads, self.url.get_dialect().driver)
        if session_options is not None and not isinstance(session_options, Mapping):
            raise ConfigurationError(
                f"session_options takes a dictionary, not {kind_of(session_options)}."
            )
        self._session_options = {
            "expire_on_commit": False,
            **(session_options or {}),
            # Without this option, a session could be used again after its close, and keep a
            # connection.
            "close_resets_only": False,
        }
        self.observers: tuple[UnitObserver, ...] = ()

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
        if not isinstance(variable, str) or "://" in variable:
            # Do not show the value in the error, because a URL may contain a password.
            raise ConfigurationError(
                f"{cls.__name__}.from_env takes the name of an environment variable; a URL goes "
                f"into {cls.__name__} itself."
            )
        url = os.environ.get(variable)
        if not url:
            # Show the value in the error only if it looks like the name of an environment variable.
            # Any other value may be a secret.
            name = variable if re.fullmatch(r"[A-Z][A-Z0-9_]*", variable) else "The variable"
            raise ConfigurationError(
                f"{name} is not set. Set it to a database URL, for example "
                f"`{name.replace('The variable', 'DATABASE_URL')}=sqlite:///shop.db`, or give "
                f"{cls.__name__} the URL itself."
            )
        try:
            url_with_driver(url, asynchronous=cls.is_async)
        except ConfigurationError as error:
            raise ConfigurationError(f"Wrong value of {variable}: {error}") from error
        return cls(url, **options)

    @classmethod
    def from_engine(
        cls, engine: E, *, session_options: Any = None, ping_on_startup: bool = True
    ) -> Self:
        """Make a database object that uses an existing engine, and never disposes this engine.

        The database is running at once and needs no startup. This package adds listeners to the
        engine. It removes them when the last database object with this engine is garbage collected.
        An async engine belongs to the event loop that uses it first. If this loop was closed, the
        next loop that uses the engine gets new connections. If several loops use the engine at the
        same time, the engine needs `poolclass=NullPool`.

        Args:
            engine: An `AsyncEngine` for `AsyncDatabase`, an `Engine` for `SyncDatabase`.
            session_options: The same dictionary as for `AsyncDatabase(...)` or `SyncDatabase(...)`.
            ping_on_startup: True if the startup must fail when the database does not answer.

        Raises:
            ConfigurationError: `engine` is not an engine, or is of the wrong kind (async or sync).
        """
        if not isinstance(engine, cls._engine_class):
            raise ConfigurationError(
                f"{cls.__name__} needs an engine of the class "
                f"{cls._engine_class.__name__}, not {type(engine).__name__}."
            )
        from .optional.borrowed.listeners import borrow

        options = {"session_options": session_options, "ping_on_startup": ping_on_startup}
        database = cls(engine.url, **options)
        database._engine = engine
        database._owns_engine = False
        borrow(sync_engine_of(engine), database, database._observers)
        return database

    async def health(self, *, within: float = 1) -> Health:
        """Check if the database answers within a time limit, for a path such as `/health`.

        If the pool has no free connection or the server cannot be reached, the result says so, and
        no exception is raised. Callers at the same time share one check. A blocking driver cannot
        be stopped, so a check that takes too long goes on in its thread. If three such checks still
        run, no new check is started.

        Args:
            within: The time limit in seconds.

        Returns:
            The health of the database. Its attribute `replicas` has the health of each replica,
            which is checked at the same time. `answers` is about the primary alone.

        Raises:
            ConfigurationError: `within` is not a number of seconds.
        """
        check_number("within", within, 0, seconds=True)
        from .optional.health.check import health_of

        return await health_of(self, within)

    def get_session(self) -> S:
        """Return the session of this database in the current unit of work.

        The session is opened on first use, and its first statement checks out a connection of the
        pool. The session is closed permanently when the request or the `begin()` block ends.

        Raises:
            NoSession: The calling code runs neither in a request that uses this database, nor in
                its `begin()` block.
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
        if self._replica_set is None or self._reads.is_shared:
            made = self._make_session(engine, scope)
        else:
            made = self._make_session(None if read_only else engine, scope)
            self._replica_set.give_route(made)
        if read_only:
            from asgi_dbsession.session.optional.read_only.refusals import Refusals

            made.companion.read_only = Refusals(made.companion)
        return made

    @abstractmethod
    def _make_session(self, engine: E | None, scope: Scope | None) -> ManagedSession[S]: ...

    def add_observer(self, observer: UnitObserver) -> None:
        """Add an object to notify of each unit of work that uses this database.

        Args:
            observer: The object to notify. If the database is running now, the method `engine_used`
                of the object is called at once.
        """
        self.observers = (*self.observers, observer)
        self.observe(observer)

    def _check_session_options(self) -> None:
        try:
            self._make_session(None, None)
        except TypeError as error:
            raise ConfigurationError(
                f"{self} cannot make a session with these session options: {error}"
            ) from error

    def _session_class(self, base: type, option: str = "class_", default: Any = None) -> Any:
        session_class = self._session_options.pop(option, default or base)
        if isinstance(session_class, type) and issubclass(session_class, base):
            return session_class
        raise ConfigurationError(
            f"{type(self).__name__} needs a subclass of {base.__name__} as "
            f'session_options["{option}"], not {kind_of(session_class)}.'
        )
