"""Builds the engine of a database object, checks that the database answers, disposes the engine."""

from abc import ABC
from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, TypeVar

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from typing_extensions import Self

from asgi_dbsession.errors import ConfigurationError, DatabaseNotRunning, without_secrets
from asgi_dbsession.session.completion import call_here, run_to_completion
from asgi_dbsession.session.reads import Reads
from asgi_dbsession.unit.observer import UnitObserver
from asgi_dbsession.unit.together import Run

from .arguments import check_flags, check_function
from .engines import select_one, sync_engine_of
from .forks import databases, inherited_pools
from .listeners import built, prepare
from .url import is_in_memory, refuse_autocommit, url_with_driver

E = TypeVar("E", bound=Engine | AsyncEngine)


class EngineLife(ABC, Generic[E]):
    """The engine of a database object: built at startup and disposed at shutdown."""

    is_async: bool
    _create_engine: Callable[..., E]
    # A function that calls blocking code of SQLAlchemy, and that the event loop can await. For an
    # async engine: SQLAlchemy's `greenlet_spawn`. For a sync engine: a function that uses a thread.
    _run: Run
    # An object of the class `ReplicaSet` of the package `replicas`. None without replicas.
    _replica_set: Any = None
    _reads: Reads

    def __init__(
        self,
        url: str | URL,
        engine_options: dict[str, Any],
        ping_on_startup: bool,
        on_engine: Callable[[Engine], object] | None,
    ) -> None:
        check_flags(ping_on_startup=ping_on_startup)
        if on_engine is not None:
            check_function("on_engine", on_engine, "engine")
        named = url_with_driver(url, asynchronous=self.is_async)
        for driver_options in (named.query, engine_options.get("connect_args")):
            refuse_autocommit(driver_options)
        if named.query:
            from .optional.urls.translation import translate_options

            named, engine_options = translate_options(named, engine_options)
        if is_in_memory(named):
            from .optional.in_memory import options_for_memory

            engine_options = options_for_memory(named, engine_options)
        self.url: URL = named
        self._engine_options = engine_options
        self._ping_on_startup = ping_on_startup
        self._on_engine = on_engine
        self._engine: E | None = None
        self._owns_engine = True
        self._starts = 0
        self._starting = Lock()
        # A function that prepares each new engine for this package. In a test,
        # `testing.rolled_back()` sets another function here.
        self._prepare: Callable[[Engine], None] = prepare
        self._observers: list[UnitObserver] = []
        databases.add(self)

    def __repr__(self) -> str:
        # `repr` must not fail even if `__init__` failed before the URL was set, because a traceback
        # may show such an object.
        shown = repr(without_secrets(self.url)) if hasattr(self, "url") else "…"
        return f"{type(self).__name__}({shown})"

    @property
    def engine(self) -> E:
        """The SQLAlchemy engine, for example to call `create_all` or to read pool metrics.

        Raises:
            DatabaseNotRunning: The database was not started, or was shut down.
        """
        self._refuse_other_loop()
        if self._engine is None:
            raise DatabaseNotRunning(self)
        return self._engine

    def _refuse_other_loop(self) -> None:
        """Raise an error if the engine belongs to another event loop than the running one."""

    @property
    def is_running(self) -> bool:
        """True between `startup` and `shutdown` of this object. Always True after `from_engine`."""
        return self._engine is not None

    @property
    def replicas(self) -> tuple[Self, ...]:
        """The replicas, as objects of this class, each with its own `engine` and `health()`."""
        return self._replica_set.databases if self._replica_set is not None else ()

    async def startup(self) -> None:
        """Build the engine in the running event loop, and check that the database answers.

        If this database object was started already, this method only counts the call, and checks
        again that the database answers. Call `shutdown` as often as `startup`.

        Raises:
            DatabaseUnavailable: The database did not answer. The engine was disposed.
            ConfigurationError: SQLAlchemy or the driver did not accept the options.
            DatabaseNotRunning: Another task or thread called `shutdown` during this startup.
        """
        await self._start(self._run)

    async def _start(self, run: Run) -> None:
        with self._starting:
            if self._engine is None:
                self._engine = self._build_engine()
            engine = self.engine
            self._starts += 1
        try:
            if self._ping_on_startup:
                await self._ping(run)
            if self._engine is not engine:
                raise DatabaseNotRunning(self)
            if self._replica_set is not None:
                await self._replica_set.startup(run)
        except BaseException:
            # Undo this startup. If `_engine` is not `engine` any more, another task or thread has
            # called `shutdown` meanwhile, and there is nothing left to undo.
            if self._engine is engine:
                await self._stop(run)
            raise

    async def shutdown(self) -> None:
        """Close all connections, if this method was called as often as `startup`.

        All connections are closed even if the task is cancelled.
        """
        await self._stop(self._run)

    async def _stop(self, run: Run) -> None:
        engine = None
        with self._starting:
            self._starts = max(0, self._starts - 1)
            if self._starts == 0 and self._owns_engine:
                engine, self._engine = self._engine, None
        try:
            if engine is not None:
                disposing = run(Engine.dispose, sync_engine_of(engine))
                await (disposing if run is call_here else run_to_completion(disposing))
        finally:
            if self._replica_set is not None and not self.is_running:
                await self._replica_set.shutdown(run)

    def after_fork(self) -> None:
        """Called in the child process after a fork: stop using connections of the parent process.

        An engine with a sync driver gets a new pool. An `AsyncDatabase` that built its engine
        itself must be started again, in the event loop of the child process.
        """
        # At the fork, a thread of the parent process may have held the lock. That thread does not
        # run in this process, so nobody would release the lock. So make a new lock.
        self._starting = Lock()
        if self._replica_set is not None:
            self._replica_set.after_fork()
        if self._engine is None:
            return
        engine = sync_engine_of(self._engine)
        # If the SQLite database is in memory, keep its connections: a new connection would open an
        # empty database.
        if not is_in_memory(engine.url):
            inherited_pools.append(engine.pool)
            engine.dispose(close=False)
        if self.is_async and self._owns_engine:
            self._forget_engine()

    def _forget_engine(self) -> None:
        self._engine, self._starts = None, 0

    async def __aenter__(self) -> Self:
        await self.startup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    async def ping(self) -> None:
        """Send a statement to check that the database answers.

        This method has no time limit. Use the connect timeout of the driver, in `connect_args`.

        Raises:
            DatabaseUnavailable: The database did not answer. The driver's error is the cause of
                this error.
            DatabaseNotRunning: The database was not started.
        """
        await self._ping(self._run)

    async def _ping(self, run: Run) -> None:
        engine = sync_engine_of(self.engine)
        try:
            await run(select_one, engine, engine.pool)
        except Exception as error:
            from .optional.failures.explanation import failure_of

            failure = failure_of(self, error)
            if failure is error:
                raise
            raise failure from error

    def _build_engine(self) -> E:
        try:
            engine = self._create_engine(self.url, **self._engine_options)
        # Wrong options can raise many kinds of errors in SQLAlchemy and in drivers: ArgumentError,
        # KeyError, AttributeError and others. So catch all of them.
        except Exception as error:
            from .optional.failures.explanation import reason_of

            names = ", ".join(self._engine_options) or "none"
            reason = reason_of(self, error)
            raise ConfigurationError(
                f"{self} cannot be built with these engine options ({names}): {reason}"
            ) from None
        sync_engine = sync_engine_of(engine)
        built.add(sync_engine)
        self._reads.watch(sync_engine)
        self._prepare(sync_engine)
        for observer in self._observers:
            observer.engine_used(sync_engine)
        if self._on_engine is not None:
            self._on_engine(sync_engine)
        return engine
