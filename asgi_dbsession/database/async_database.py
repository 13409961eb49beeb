"""The database class for async engines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from sqlalchemy import URL, Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from sqlalchemy.util import greenlet_spawn
from typing_extensions import TypeVarTuple, Unpack, override

from asgi_dbsession.errors import ConfigurationError, DatabaseNotRunning
from asgi_dbsession.session.companion import Companion
from asgi_dbsession.session.guard import guarded_async_class, guarded_class
from asgi_dbsession.session.lock import TaskLock
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.writes import Writes
from asgi_dbsession.types import Scope
from asgi_dbsession.unit.blocks import block_of
from asgi_dbsession.unit.retry_on import RetryOn

from .base import Database
from .options import AnyAsyncSession, AsyncSessionOptions
from .questions import TaskQuestions
from .replicas import Replicas

T = TypeVar("T")
Args = TypeVarTuple("Args")


class AsyncDatabase(Database[AsyncEngine, AnyAsyncSession]):
    """A database with an async engine; the engine is built in the event loop at startup.

    Args:
        url: A database URL. A URL without a driver (`postgresql://`, `mysql://`, `sqlite://`) gets
            an installed async driver.
        session_options: Arguments for the session class, and the class itself: `{"class_":
            MySession}`. The default of `expire_on_commit` is False.
        ping_on_startup: True to let the startup fail if the database does not answer.
        on_engine: A plain function that is called with each new `sqlalchemy.Engine` before its
            first connection. Use this function to add listeners for SQLAlchemy's events.
        autocommit_reads: True: read without a transaction until the unit of work writes. False:
            always read in a transaction. None: read without a transaction only on PostgreSQL at
            READ COMMITTED, where the application sees no difference.
        replicas: The URLs of replicas of a PostgreSQL server, or `Replicas(...)`. A unit of work
            that may only read uses a replica that has replayed all changes that its client has
            seen.
        **engine_options: Arguments for `sqlalchemy.ext.asyncio.create_async_engine`.

    Raises:
        ConfigurationError: The URL is not a database URL, or its driver is not installed or is not
            for asyncio.
    """

    is_async = True
    _engine_class = AsyncEngine

    def __init__(
        self,
        url: str | URL,
        *,
        session_options: AsyncSessionOptions[AnyAsyncSession] | None = None,
        ping_on_startup: bool = True,
        on_engine: Callable[[Engine], object] | None = None,
        autocommit_reads: bool | None = None,
        replicas: Sequence[str | URL] | Replicas = (),
        **engine_options: Any,
    ) -> None:
        options = session_options, ping_on_startup, autocommit_reads, engine_options
        super().__init__(url, *options, on_engine=on_engine)
        session_class: type[AnyAsyncSession] = self._session_class(AsyncSession)
        self._guarded_class = guarded_async_class(session_class)
        default = session_class.sync_session_class
        self._sync_class = guarded_class(
            self._session_class(Session, "sync_session_class", default)
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._questions = TaskQuestions(self._select_one)
        self._check_session_options()
        self._add_replicas(url, replicas, {"on_engine": on_engine} | engine_options)

    @asynccontextmanager
    async def begin(
        self, *, join: bool = False, read_only: bool = False, after: str | None = None
    ) -> AsyncIterator[AnyAsyncSession]:
        """Open a new unit of work: COMMIT on success, ROLLBACK on any error or cancellation.

        Use `begin()` in workers, scripts and child tasks, and for rows that must stay even if the
        request is rolled back. COMMIT or ROLLBACK runs to completion even if the task is cancelled.
        Inside a request, the block has its own transaction, so it waits for rows that the request
        has locked. `@database.begin()` is also a decorator for `async def` functions.

        Args:
            join: True to join the open unit of work, if that unit has this database: the block then
                runs in a savepoint of the session that `database.get_session()` returns. An error
                rolls back to the savepoint and is raised; after a success, the outer unit commits.
                `on_commit` and `set_rollback` apply to the outer unit. While the block is open,
                only code inside the block may use the session. If no unit is open, a new unit is
                opened.
            read_only: True to refuse writes: in the session, and in the database. With `join`, the
                block may only read, even if the outer unit may write. Without `join`, the block
                uses a replica, if the database has replicas. If this argument is False and the
                outer unit may only read, the block may only read too.
            after: A value of the property `position`, for `read_only=True` and a database with
                replicas. The block then sees all changes that were committed before this position.

        Yields:
            A new session, which is closed permanently at the end of the block. Inside the block,
            `get_session()` returns this session too.

        Raises:
            DatabaseNotRunning: The database has not been started.
            TransactionAborted: The application caught an error that aborted the transaction.
            ConcurrentUse: Another task is inside `begin(join=True)` on the same session.
            ForbiddenWrite: The block may only read, and tried to write.
            Exception: The exception of COMMIT; nothing was stored.
        """
        self._see(after, join=join, read_only=read_only)
        async with block_of(self, join, read_only) as session:
            yield session

    async def run_transaction(
        self,
        function: Callable[[Unpack[Args]], Awaitable[T]],
        *args: *Args,
        attempts: int = 3,
        retry_on: RetryOn = None,
    ) -> T:
        """Call a function in a new unit of work, and call it again after a conflict.

        Use `run_transaction` in workers and scripts, where no request can be retried. Each attempt
        runs the whole function, so side effects outside of the database happen again. There is no
        retry after another COMMIT inside the function: `session.commit()`, or a `begin()` of any
        database. Each retry waits for a random time of at most a second, and is logged.

        Args:
            function: A coroutine function. Inside this function, `get_session()` returns the
                session of the new unit.
            *args: The arguments for the function.
            attempts: How often the function may run, the first time included.
            retry_on: Other errors to retry like a conflict: an exception class, a tuple of classes,
                or a plain function that takes an exception and returns True or False.

        Returns:
            The result of the function, after COMMIT.

        Raises:
            DatabaseNotRunning: The database has not been started.
            ConfigurationError: An argument is wrong.
            Exception: The exception of the function or of COMMIT in the last attempt.
        """
        from asgi_dbsession.retry.transaction import run_transaction

        return await run_transaction(self, function, args, attempts, retry_on)

    @property
    @override
    def engine(self) -> AsyncEngine:
        if self._loop is not None or not self._owns_engine:
            self._refuse_other_loop()
        if self._engine is None:
            raise DatabaseNotRunning(self)
        return self._engine

    @override
    async def startup(self) -> None:
        if self._owns_engine and self._loop is not None and self._loop.is_closed():
            # The event loop of this engine was closed. The engine's connections cannot be used in
            # another event loop.
            self._forget_engine()
        self._refuse_other_loop()
        await super().startup()

    @override
    def _make_session(
        self, engine: AsyncEngine | None, scope: Scope | None, read_only: bool
    ) -> ManagedSession[AnyAsyncSession]:
        session = self._guarded_class(
            bind=engine, sync_session_class=self._sync_class, **self._session_options
        )
        orm = session.sync_session
        orm.info["scope"] = scope
        companion = Companion(TaskLock(self), self._reads, Writes(self, read_only))
        return ManagedSession(session, orm, companion, greenlet_spawn)

    @override
    def _derive_session_class(self, derived: Callable[[type[Any]], type[Any]]) -> None:
        self._sync_class = derived(self._sync_class)

    def _refuse_other_loop(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        # The caller runs in a worker thread, which has no event loop to compare.
        except RuntimeError:
            return
        if self._loop is loop:
            return
        if not self._owns_engine and self._engine is not None:
            self._take_to_loop(self._engine, loop)
        elif self._loop is not None:
            raise DatabaseNotRunning(self, other_loop=True)

    def _take_to_loop(self, engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> None:
        """Use an engine of the application in an event loop that has not used the engine before."""
        if self._loop is not None and not isinstance(engine.pool, NullPool):
            if not self._loop.is_closed():
                raise DatabaseNotRunning(self, other_loop=True)
            # The old connections belong to the closed event loop, so only the garbage collector can
            # free them.
            engine.sync_engine.dispose(close=False)
        self._loop = loop

    @override
    def _create_engine(self) -> AsyncEngine:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError(
                f"{self} works on asyncio only, and this is another event loop, such as "
                "trio. Describe it as a SyncDatabase there."
            ) from None
        engine = create_async_engine(self.url, **self._engine_options)
        self._loop = loop
        return engine

    @override
    def _sync_engine(self, engine: AsyncEngine) -> Engine:
        return engine.sync_engine

    @override
    async def _select_one(self, engine: AsyncEngine) -> None:
        pool = engine.pool
        async with engine.connect() as connection:
            await connection.execute(select(1))
            # The engine was disposed during the statement, so nobody would close this connection
            # later. Close it now.
            if engine.pool is not pool:
                await connection.invalidate()

    @override
    async def _dispose(self, engine: AsyncEngine) -> None:
        await engine.dispose()

    @override
    def _forget_engine(self) -> None:
        super()._forget_engine()
        self._loop = None
