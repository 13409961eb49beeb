"""The base class of `AsyncDatabase` and `SyncDatabase`."""

import os
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any, Generic, TypeVar

from anyio import create_task_group
from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool
from typing_extensions import Self

from asgi_dbsession.errors import (
    ConfigurationError,
    DBSessionError,
)
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.reads import Reads, check_autocommit_reads
from asgi_dbsession.types import Scope
from asgi_dbsession.unit.observer import UnitObserver
from asgi_dbsession.unit.unit_of_work import unit_that_manages

from .borrowed import borrow
from .health import Health
from .questions import Questions
from .replicated import ReplicatedLife

E = TypeVar("E", bound=Engine | AsyncEngine)
S = TypeVar("S")


class Database(ReplicatedLife[E], Generic[E, S]):
    """The methods that `AsyncDatabase` and `SyncDatabase` share."""

    _engine_class: type[E]
    _questions: Questions

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
        check_autocommit_reads(self, autocommit_reads, self.url.get_dialect().driver)
        self._reads = Reads(autocommit_reads)
        if not isinstance(session_options or {}, Mapping):
            raise ConfigurationError(
                f"session_options takes a dictionary, not something of type "
                f"{type(session_options).__name__}."
            )
        self._session_options = {
            "expire_on_commit": False,
            **(session_options or {}),
            # Without this option, a closed session opens again silently and leaks a connection.
            "close_resets_only": False,
        }
        self.observers: tuple[UnitObserver, ...] = ()

    @classmethod
    def from_env(cls, variable: str = "DATABASE_URL", **options: Any) -> Self:
        """Make a database from the URL in an environment variable.

        Args:
            variable: The name of the environment variable.
            **options: The same keyword arguments as for the class.

        Raises:
            ConfigurationError: The variable is not set, or its value is not a usable URL.
        """
        if not isinstance(variable, str) or "://" in variable:
            # Do not show the value: a URL contains a password.
            raise ConfigurationError(
                f"{cls.__name__}.from_env takes the name of an environment variable; a URL goes "
                f"into {cls.__name__} itself."
            )
        url = os.environ.get(variable)
        if not url:
            # Show the value only if it looks like the name of a variable, because another value may
            # be a secret.
            name = variable if re.fullmatch(r"[A-Z][A-Z0-9_]*", variable) else "The variable"
            raise ConfigurationError(
                f"{name} is not set. Set it to a database URL, for example "
                f"`{name.replace('The variable', 'DATABASE_URL')}=sqlite:///shop.db`, or give "
                f"{cls.__name__} the URL itself."
            )
        return cls(url, **options)

    @classmethod
    def from_engine(
        cls, engine: E, *, session_options: Any = None, ping_on_startup: bool = True
    ) -> Self:
        """Make a database from an existing engine; the database never disposes this engine.

        The database is running at once, without a startup. This package adds listeners to the
        engine, and removes them when the last database that uses the engine is garbage collected.
        An async engine belongs to the event loop that uses it first. If this loop was closed, the
        next loop that uses the engine gets new connections. If several loops use the engine at the
        same time, the engine needs `poolclass=NullPool`.

        Args:
            engine: An `AsyncEngine` for `AsyncDatabase`, an `Engine` for `SyncDatabase`.
            session_options: The same dictionary as for `AsyncDatabase(...)` or `SyncDatabase(...)`.
            ping_on_startup: True to let the startup fail if the database does not answer.

        Raises:
            ConfigurationError: `engine` is not an engine, or is of the wrong kind (async or sync).
        """
        if not isinstance(engine, cls._engine_class):
            raise ConfigurationError(
                f"{cls.__name__} needs an engine of the class "
                f"{cls._engine_class.__name__}, not {type(engine).__name__}."
            )
        options = {"session_options": session_options, "ping_on_startup": ping_on_startup}
        database = cls(engine.url, **options)
        database._engine = engine
        database._owns_engine = False
        borrow(database._sync_engine(engine), database, database._observers)
        return database

    async def health(self, *, within: float = 1) -> Health:
        """Check if the database answers within a time limit; for a path like `/health`.

        If the pool is exhausted or the server is unreachable, the result is negative; there is no
        exception. Parallel callers share one check. A blocking driver cannot be stopped, so a check
        that takes too long continues in its thread. While three such checks continue, no new check
        is started.

        Args:
            within: The time limit in seconds.

        Returns:
            The health of the database. `replicas` of the result has the health of each replica,
            checked at the same time; `answers` is about the primary only.
        """
        if not self.replicas:
            return await self._health(within)
        found: list[Health | None] = [None for _ in (self, *self.replicas)]

        async def ask(number: int, database: Self) -> None:
            found[number] = await database._health(within)

        async with create_task_group() as tasks:
            for number, each in enumerate((self, *self.replicas)):
                tasks.start_soon(ask, number, each)
        own, *replicas = (each for each in found if each is not None)
        return replace(own, replicas=tuple(replicas))

    async def _health(self, within: float) -> Health:
        start = perf_counter()
        try:
            answers = await self._questions.answers(self.engine, within)
            reason = None if answers else f"{self} did not answer within {within:g} s"
        except DBSessionError as error:
            answers, reason = False, str(error)
        except Exception as error:
            answers, reason = False, str(self._failure(error))
        latency = perf_counter() - start if answers else None
        pool = self._sync_engine(self._engine).pool if self._engine is not None else None
        if not isinstance(pool, QueuePool):
            return Health(answers, latency, reason, None, None, None)
        overflow = max(0, pool.overflow())
        return Health(answers, latency, reason, pool.size(), pool.checkedout(), overflow)

    def get_session(self) -> S:
        """Return the session of this database in the current unit of work.

        The session is opened on first use, and its first statement checks out a connection. The
        session is valid until the request (or the `begin()`) ends, and is then closed permanently.

        Raises:
            NoSession: This code runs outside of a request that serves this database, and outside of
                `begin()`.
            SessionClosed: The request that started the calling task has ended.
            DatabaseNotRunning: The database has not been started.
        """
        return unit_that_manages(self).open(self)

    async def session_dependency(self) -> S:
        """Return what `get_session()` returns, for `Depends` (FastAPI) or `Provide` (Litestar).

        This method is a coroutine function, so that frameworks do not run it in a thread. It has no
        parameters, because frameworks would take the value of a parameter from the URL.
        """
        return self.get_session()

    def open_session(self, scope: Scope | None, *, read_only: bool) -> ManagedSession[S]:
        """Open a session that a unit of work closes; applications call `get_session` or `begin`."""
        engine: E | None = self.engine
        if self._replica_set is None or self._reads.is_shared:
            return self._make_session(engine, scope, read_only)
        made = self._make_session(None if read_only else engine, scope, read_only)
        self._replica_set.give_route(made)
        return made

    @abstractmethod
    def _make_session(
        self, engine: E | None, scope: Scope | None, read_only: bool
    ) -> ManagedSession[S]: ...

    def add_observer(self, observer: UnitObserver) -> None:
        """Add an observer of the units of work that open a session of this database.

        Args:
            observer: The object to call at each event of these units. If the database is running,
                the method `engine_used` of the observer is called now.
        """
        self.observers = (*self.observers, observer)
        self.observe(observer)

    def _check_session_options(self) -> None:
        try:
            self._make_session(None, None, False)
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
            f'session_options["{option}"], not {_kind_of(session_class)}.'
        )


def _kind_of(given: object) -> str:
    # Do not show the value: the caller may have given a secret for the wrong argument.
    return (
        given.__name__ if isinstance(given, type) else f"something of type {type(given).__name__}"
    )
