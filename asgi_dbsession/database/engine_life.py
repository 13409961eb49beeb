"""When the engine of a database is built, proven to work, and disposed."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from typing_extensions import Self

from asgi_dbsession.errors import (
    ConfigurationError,
    DatabaseNotRunning,
    DBSessionError,
    without_secrets,
)
from asgi_dbsession.session.completion import run_to_completion
from asgi_dbsession.session.failures import watch
from asgi_dbsession.session.reads import watch_reads
from asgi_dbsession.unit.observer import UnitObserver

from .borrowed import own
from .failures import failure_of, reason_of
from .forks import inherited_pools, notice_forks
from .options_in_url import translate_options
from .secrets import secrets_of
from .url import is_in_memory, options_for_memory, url_with_driver

E = TypeVar("E", bound=Engine | AsyncEngine)


class EngineLife(ABC, Generic[E]):
    """The engine of a database: described now, built at startup, disposed at shutdown."""

    is_async: bool

    def __init__(
        self, url: str | URL, ping_on_startup: bool, engine_options: dict[str, Any]
    ) -> None:
        named = url_with_driver(url, asynchronous=self.is_async)
        translated, engine_options = translate_options(named, engine_options)
        self.url: URL = translated
        self._engine_options = options_for_memory(self.url, engine_options)
        self._ping_on_startup = ping_on_startup
        self._engine: E | None = None
        self._owns_engine = True
        self._starts = 0
        self._starting = Lock()
        self._prepare: Callable[[Engine], None] = watch
        self._observers: list[UnitObserver] = []
        notice_forks(self)

    def __repr__(self) -> str:
        url = getattr(self, "url", None)  # none yet, where a traceback shows a half-made one
        shown = repr(without_secrets(url)) if url is not None else "…"
        return f"{type(self).__name__}({shown})"

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
        engine = self._begin_start()
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
        engine = self._end_start()
        if engine is not None:
            await run_to_completion(self._dispose(engine))

    def _begin_start(self) -> E:
        """Count a start; the engine, built by the first one."""
        with self._starting:
            if self._engine is None:
                self._engine = self._build_engine()
            self._starts += 1
            return self._engine

    def _end_start(self) -> E | None:
        """Undo a start; the engine to dispose, after the last one."""
        with self._starting:
            self._starts = max(0, self._starts - 1)
            if self._starts > 0 or not self._owns_engine or self._engine is None:
                return None
            engine = self._engine
            self._forget_engine()
            return engine

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
            self._raise_failure(error)
        finally:
            if self._engine is not engine:  # shut down meanwhile: close what was opened since
                await run_to_completion(self._dispose(engine))

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
        own(self._sync_engine(engine))
        self._prepare(self._sync_engine(engine))
        watch_reads(self._sync_engine(engine))
        for observer in self._observers:
            observer.engine_used(self._sync_engine(engine))
        return engine

    def observe(self, observer: UnitObserver) -> None:
        """Tell an observer of each engine that sessions of this database use, now and later."""
        if not self._observers:
            self._tell_binds()
        self._observers.append(observer)
        if self._engine is not None:
            observer.engine_used(self._sync_engine(self._engine))

    def _raise_failure(self, error: Exception) -> NoReturn:
        failure = self._failure(error)
        if failure is error:
            raise error
        raise failure from error

    def _failure(self, error: Exception) -> Exception:
        return failure_of(self, error, secrets_of(self.url, self._engine_options))

    @abstractmethod
    def _tell_binds(self) -> None: ...

    @abstractmethod
    def _create_engine(self) -> E: ...

    @abstractmethod
    async def _select_one(self, engine: E) -> None: ...

    @abstractmethod
    async def _dispose(self, engine: E) -> None: ...

    @abstractmethod
    def _sync_engine(self, engine: E) -> Engine: ...
