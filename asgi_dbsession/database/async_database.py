"""A database behind an async engine."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from sqlalchemy import URL, Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from sqlalchemy.util import greenlet_spawn
from typing_extensions import TypeVarTuple, Unpack, override

from asgi_dbsession.errors import ConfigurationError, DatabaseNotRunning
from asgi_dbsession.session.guard import Companion, guarded_async_class, guarded_class
from asgi_dbsession.session.lock import TaskLock
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.telling import telling_class
from asgi_dbsession.types import Scope
from asgi_dbsession.unit.begin import unit_of_its_own
from asgi_dbsession.unit.ending import close
from asgi_dbsession.unit.join import joined, unit_to_join
from asgi_dbsession.unit.retry_on import RetryOn

from .base import Database
from .options import AnyAsyncSession, AsyncSessionOptions
from .questions import TaskQuestions

T = TypeVar("T")
Args = TypeVarTuple("Args")


class AsyncDatabase(Database[AsyncEngine, AnyAsyncSession]):
    """A database behind an async engine: described now, built in the event loop at startup.

    Args:
        url: A database URL. One that names no driver (`postgresql://`, `mysql://`, `sqlite://`)
            gets an installed async one.
        session_options: For the session class, itself included: `{"class_": MySession}`.
            `expire_on_commit` is False unless given.
        ping_on_startup: Whether startup fails when the database does not answer.
        autocommit_reads: Whether a unit of work that only reads does without a transaction. None:
            where no application can tell, on PostgreSQL at READ COMMITTED. False: never.
        **engine_options: For `sqlalchemy.ext.asyncio.create_async_engine`.

    Raises:
        ConfigurationError: The URL is none, its driver is missing, or it blocks.
    """

    is_async = True
    _engine_class = AsyncEngine

    def __init__(
        self,
        url: str | URL,
        *,
        session_options: AsyncSessionOptions[AnyAsyncSession] | None = None,
        ping_on_startup: bool = True,
        autocommit_reads: bool | None = None,
        **engine_options: Any,
    ) -> None:
        super().__init__(url, session_options, ping_on_startup, autocommit_reads, engine_options)
        session_class: type[AnyAsyncSession] = self._session_class(AsyncSession)
        self._guarded_class = guarded_async_class(session_class)
        default = session_class.sync_session_class
        self._sync_class = guarded_class(
            self._session_class(Session, "sync_session_class", default)
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._questions = TaskQuestions(self._select_one)
        self._check_session_options()

    @asynccontextmanager
    async def begin(self, *, join: bool = False) -> AsyncIterator[AnyAsyncSession]:
        """Open a unit of work of its own: COMMIT on success, ROLLBACK on any error or cancellation.

        For workers, scripts, child tasks, and rows that must survive the rollback of a request.
        Ending it runs to completion although it is cancelled. Inside a request it is a transaction
        of its own, and so waits for rows that the request has locked.

        It is a decorator too: `@database.begin()` above an `async def` function.

        Args:
            join: Whether to join the unit of work that is open here, if it has this database: a
                savepoint of the session that `database.get_session()` returns. An error rolls back
                to the savepoint, and rises; a success leaves COMMIT to the outer unit, to which
                `on_commit` and `set_rollback` apply. While the block is open, only code inside of
                it may use the session. Where no unit is open, it opens one of its own.

        Yields:
            A new session, closed permanently at the end of the block. Inside the block it is what
            `get_session()` returns too.

        Raises:
            DatabaseNotRunning: The database has not been started.
            TransactionAborted: An error was swallowed that had aborted the transaction.
            ConcurrentUse: Another task is inside of `begin(join=True)` on the same session.
            Exception: Whatever COMMIT raised; nothing was stored.
        """
        outer = unit_to_join(self) if join else None
        if outer is not None:
            async with joined(outer, self) as session:
                yield session
            return
        with unit_of_its_own(self) as unit:
            try:
                yield unit.open(self)
            except BaseException as error:
                await close(unit, commit=False, error=error)
                raise
            else:
                await close(unit, commit=not unit.rollback)

    async def run_transaction(
        self,
        function: Callable[[Unpack[Args]], Awaitable[T]],
        *args: *Args,
        attempts: int = 3,
        retry_on: RetryOn = None,
    ) -> T:
        """Call a function in a unit of work of its own, and again after a conflict.

        For workers and scripts, where no request can be run again. The function runs from the start
        each time, so what it does elsewhere is done again. It never runs again once something else
        was committed inside: `session.commit()`, or a `begin()` of any database. Each retry waits
        a random time of at most a second, and is logged.

        Args:
            function: A coroutine function. `get_session()` in it is the session of the unit.
            *args: For the function.
            attempts: How often it may run.
            retry_on: What else counts as a conflict: an exception class, a tuple of them, or a
                plain function that is given an exception and returns True or False.

        Returns:
            What the function returned, after COMMIT.

        Raises:
            DatabaseNotRunning: The database has not been started.
            ConfigurationError: An argument is not what it should be.
            Exception: Whatever the function, or COMMIT, raised in the last attempt.
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
            # Its connections went with it; what is left of the engine could only fail.
            self._forget_engine()
        self._refuse_other_loop()
        await super().startup()

    @override
    def open_session(self, scope: Scope | None) -> ManagedSession[AnyAsyncSession]:
        return self._make_session(self.engine, scope)

    @override
    def _make_session(
        self, engine: AsyncEngine | None, scope: Scope | None
    ) -> ManagedSession[AnyAsyncSession]:
        session = self._guarded_class(
            bind=engine, sync_session_class=self._sync_class, **self._session_options
        )
        orm = session.sync_session
        orm.info["scope"] = scope
        companion = Companion(TaskLock(self), self._reads)
        return ManagedSession(session, orm, companion, greenlet_spawn)

    @override
    def _tell_binds(self) -> None:
        self._sync_class = telling_class(self._sync_class)

    def _refuse_other_loop(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a worker thread of the loop that serves the request
            return
        if self._loop is loop:
            return
        if not self._owns_engine and self._engine is not None:
            self._take_to_loop(self._engine, loop)
        elif self._loop is not None:
            raise DatabaseNotRunning(self, other_loop=True)

    def _take_to_loop(self, engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> None:
        """Use an engine of the application's own in a loop that did not use it before."""
        if self._loop is not None and not isinstance(engine.pool, NullPool):
            if not self._loop.is_closed():
                raise DatabaseNotRunning(self, other_loop=True)
            # Its connections went with the loop, and can only be left to the garbage collector.
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
            if engine.pool is not pool:  # disposed meanwhile: nobody would close what it got back
                await connection.invalidate()

    @override
    async def _dispose(self, engine: AsyncEngine) -> None:
        await engine.dispose()

    @override
    def _forget_engine(self) -> None:
        super()._forget_engine()
        self._loop = None
