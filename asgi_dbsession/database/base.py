"""An engine's life, whatever its kind."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from threading import Lock
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, TypeVar

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool
from typing_extensions import Self

from asgi_dbsession.errors import (
    ConfigurationError,
    DatabaseNotRunning,
    DBSessionError,
    without_secrets,
)
from asgi_dbsession.session.completion import run_to_completion
from asgi_dbsession.session.failures import watch
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.types import Scope
from asgi_dbsession.unit.unit_of_work import unit_that_manages

from .failures import failure_of, reason_of
from .forks import inherited_pools, notice_forks
from .health import Health
from .options_in_url import translate_options
from .questions import Questions
from .secrets import secrets_of
from .url import is_in_memory, options_for_memory, url_with_driver

E = TypeVar("E", bound=Engine | AsyncEngine)
S = TypeVar("S")


class Database(ABC, Generic[E, S]):
    """What an async and a sync database share: all but how to talk to the engine."""

    is_async: bool
    _engine_class: type[E]
    _questions: Questions

    def __init__(
        self,
        url: str | URL,
        session_options: Mapping[str, Any] | None,
        ping_on_startup: bool,
        engine_options: dict[str, Any],
    ) -> None:
        named = url_with_driver(url, asynchronous=self.is_async)
        self.url, engine_options = translate_options(named, engine_options)
        self._engine_options = options_for_memory(self.url, engine_options)
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
        self._ping_on_startup = ping_on_startup
        self._engine: E | None = None
        self._owns_engine = True
        self._starts = 0
        self._starting = Lock()
        self._prepare: Callable[[Engine], None] = watch
        self._engine_hooks: list[Callable[[Engine], None]] = []
        notice_forks(self)

    def __repr__(self) -> str:
        url = getattr(self, "url", None)  # none yet, where a traceback shows a half-made one
        shown = repr(without_secrets(url)) if url is not None else "…"
        return f"{type(self).__name__}({shown})"

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
        watch(database._sync_engine(engine))
        return database

    @property
    def engine(self) -> E:
        """The engine, for whatever needs more than a session (`create_all`, pool metrics).

        Raises:
            DatabaseNotRunning: Before startup and after shutdown.
        """
        if self._engine is None:
            raise DatabaseNotRunning(self)
        return self._engine

    @property
    def is_running(self) -> bool:
        """Whether there is an engine: from startup until shutdown; always, for `from_engine`."""
        return self._engine is not None

    async def startup(self) -> None:
        """Build the engine in the running event loop and make sure that the database answers.

        Starting is counted, not repeated: as many calls of `shutdown` end it.

        Raises:
            DatabaseUnavailable: The ping failed; nothing is left behind.
            ConfigurationError: SQLAlchemy or the driver refused the options.
            DatabaseNotRunning: It was shut down meanwhile.
        """
        with self._starting:
            if self._engine is None:
                self._engine = self._build_engine()
            engine = self._engine
            self._starts += 1
        try:
            if self._ping_on_startup:
                await self.ping()
        except BaseException:
            if self._engine is engine:  # else another caller has ended this start
                await self.shutdown()
            raise
        if self._engine is not engine:
            raise DatabaseNotRunning(self)

    async def shutdown(self) -> None:
        """Close every connection once the last start is undone, cancelled or not."""
        with self._starting:
            self._starts = max(0, self._starts - 1)
            if self._starts > 0 or not self._owns_engine or self._engine is None:
                return
            engine = self._engine
            self._forget_engine()
        await run_to_completion(self._dispose(engine))

    def after_fork(self) -> None:
        """Leave the connections of the parent process alone, in a child process.

        An engine that blocks gets a new pool. An async engine of this package must be started again
        in the event loop of the child process.
        """
        self._starting = Lock()  # a thread of the parent process may have held it
        if self._engine is None:
            return
        engine = self._sync_engine(self._engine)
        if not is_in_memory(engine.url):  # where nothing is shared
            inherited_pools.append(engine.pool)
            engine.dispose(close=False)
        if self.is_async and self._owns_engine:
            self._forget_engine()

    def _forget_engine(self) -> None:
        self._engine, self._starts = None, 0

    async def __aenter__(self) -> Self:
        await self.startup()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.shutdown()

    async def ping(self) -> None:
        """Run a statement, and so prove that the database answers.

        How long it may take is the driver's business: set its connect timeout in `connect_args`.

        Raises:
            DatabaseUnavailable: It does not answer; the driver's error is the cause.
            DatabaseNotRunning: Before startup.
        """
        engine = self.engine
        try:
            await self._select_one(engine)
        except Exception as error:
            failure = self._failure(error)
            if failure is error:
                raise
            raise failure from error
        finally:
            if self._engine is not engine:  # shut down meanwhile: close what was opened since
                await run_to_completion(self._dispose(engine))

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
        until the request (or the `begin()`) ends, and then closed for good.

        Raises:
            NoSession: Not inside a request that serves this database, nor inside `begin()`.
            SessionClosed: The request that this task belongs to is over.
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

    @abstractmethod
    def _create_engine(self) -> E: ...

    @abstractmethod
    async def _select_one(self, engine: E) -> None: ...

    @abstractmethod
    async def _dispose(self, engine: E) -> None: ...

    @abstractmethod
    def _sync_engine(self, engine: E) -> Engine: ...

    def _build_engine(self) -> E:
        try:
            engine = self._create_engine()
        except DBSessionError:
            raise
        except Exception as error:  # ArgumentError, if all is well; KeyError, AttributeError, …
            reason = reason_of(error, secrets_of(self.url, self._engine_options))
            raise ConfigurationError(
                f"{self} cannot be built with these engine options: {reason}"
            ) from None
        self._prepare(self._sync_engine(engine))
        for hook in self._engine_hooks:
            hook(self._sync_engine(engine))
        return engine

    def watch_engines(self, hook: Callable[[Engine], None]) -> None:
        """Call `hook` with each engine that sessions of this database use, now and later.

        Args:
            hook: Called again for the same engine if several databases or sessions share it.
        """
        if hook in self._engine_hooks:
            return
        self._engine_hooks.append(hook)
        if self._engine is not None:
            hook(self._sync_engine(self._engine))

    def _watch_engine(self, engine: Engine) -> None:
        """Watch an engine that a session uses besides that of its database (`binds`)."""
        for hook in (watch, *self._engine_hooks):
            hook(engine)

    def _failure(self, error: Exception) -> Exception:
        return failure_of(self, error, secrets_of(self.url, self._engine_options))

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
