"""An engine's life, whatever its kind."""

import os
import re
from abc import abstractmethod
from collections.abc import Mapping
from time import perf_counter
from typing import Any, Generic, TypeVar

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
from .engine_life import EngineLife
from .health import Health
from .questions import Questions

E = TypeVar("E", bound=Engine | AsyncEngine)
S = TypeVar("S")


class Database(EngineLife[E], Generic[E, S]):
    """What an async and a sync database share: all but how to talk to the engine."""

    _engine_class: type[E]
    _questions: Questions

    def __init__(
        self,
        url: str | URL,
        session_options: Mapping[str, Any] | None,
        ping_on_startup: bool,
        autocommit_reads: bool | None,
        engine_options: dict[str, Any],
    ) -> None:
        super().__init__(url, ping_on_startup, engine_options)
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
            # A closed session would silently open again, and leak.
            "close_resets_only": False,
        }
        self.observers: tuple[UnitObserver, ...] = ()

    @classmethod
    def from_env(cls, variable: str = "DATABASE_URL", **options: Any) -> Self:
        """Describe the database that an environment variable names.

        Args:
            variable: The variable that holds the URL.
            **options: As for the class itself.

        Raises:
            ConfigurationError: The variable is not set, or what it holds cannot work.
        """
        if not isinstance(variable, str) or "://" in variable:
            # Not quoted: it may hold a password.
            raise ConfigurationError(
                f"{cls.__name__}.from_env takes the name of an environment variable; a URL goes "
                f"into {cls.__name__} itself."
            )
        url = os.environ.get(variable)
        if not url:
            # Quoted only where it looks like the name of a variable: it may be a secret.
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
        """Use an engine of yours. It stays yours: it is running at once, and never disposed.

        Its listeners of this package go when the last database goes that was made from it. An
        async engine belongs to the event loop that uses it first. When that loop has been closed,
        the next one gets new connections; several loops at once need `poolclass=NullPool`.

        Args:
            engine: An `AsyncEngine` for `AsyncDatabase`, an `Engine` for `SyncDatabase`.
            session_options: As for the class itself.
            ping_on_startup: As for the class itself.

        Raises:
            ConfigurationError: It is an engine of the other kind, or none.
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
        """Say whether the database answers, soon and without raising, for a route like `/health`.

        Where the pool is exhausted or the server gone, it gives up in time. Callers share the
        question that is under way. A blocking driver cannot be stopped: a question that was given
        up goes on in its thread, and while three of them do, no other one is asked.

        Args:
            within: Seconds to wait for the answer.
        """
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
        """The session of this database in the current unit of work.

        Opened on first use; its connection is checked out by the first statement. It is valid
        until the request (or the `begin()`) ends, and then closed permanently.

        Raises:
            NoSession: Not inside a request that serves this database, nor inside `begin()`.
            SessionClosed: The request that this task belongs to has ended.
            DatabaseNotRunning: The database has not been started.
        """
        return unit_that_manages(self).open(self)

    async def session_dependency(self) -> S:
        """`get_session` for injectors: FastAPI's `Depends`, Litestar's `Provide`.

        A coroutine function, so that none of them runs it in a thread, and without
        parameters, so that none of them takes one for a query parameter.
        """
        return self.get_session()

    @abstractmethod
    def open_session(self, scope: Scope | None) -> ManagedSession[S]:
        """Make a session for a unit of work to end; applications call `get_session` or `begin`."""

    @abstractmethod
    def _make_session(self, engine: E | None, scope: Scope | None) -> ManagedSession[S]: ...

    def add_observer(self, observer: UnitObserver) -> None:
        """Have `observer` told of each unit of work that opens a session of this database.

        Args:
            observer: Told of the unit from then on; and at once of the engines.
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
            f'session_options["{option}"], not {_kind_of(session_class)}.'
        )


def _kind_of(given: object) -> str:
    # Not the value: in the wrong place, it may be a secret.
    return (
        given.__name__ if isinstance(given, type) else f"something of type {type(given).__name__}"
    )
