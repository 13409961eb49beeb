"""The class `AsyncDatabase`, for async engines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn
from typing_extensions import TypeVarTuple, Unpack, override

from asgi_dbsession.errors import ConfigurationError, DatabaseNotRunning
from asgi_dbsession.session.async_guard import guarded_async_class
from asgi_dbsession.session.companion import Companion
from asgi_dbsession.session.guard import guarded_class
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.task_lock import TaskLock
from asgi_dbsession.types import RetryOn
from asgi_dbsession.unit.blocks import block_of
from asgi_dbsession.unit.together import Run

from .base import Database
from .decorator import AsyncDecoratingBlock
from .options import AnyAsyncSession, AsyncSessionOptions, take_class

T = TypeVar("T")
Args = TypeVarTuple("Args")


class AsyncDatabase(Database[AsyncEngine, AnyAsyncSession, AsyncSessionOptions[AnyAsyncSession]]):
    """A database with an async engine, which is built at startup in the running event loop.

    Args:
        url: A database URL. If it names no driver (`postgresql://`, `mysql://`, `sqlite://`), an
            async driver that is installed is used.
        session_options: Arguments for the sessions, for example `{"class_": MySession}` for their
            class. `expire_on_commit` is False by default.
        ping_on_startup: True if the startup must fail when the database does not answer.
        on_engine: A plain function that is called with each new `sqlalchemy.Engine` before its
            first connection. It can add listeners for SQLAlchemy's events to the engine.
        autocommit_reads: True: a request or `begin()` block reads without a transaction until it
            sends a statement that may write. This needs asyncpg, psycopg, asyncmy or aiomysql.
            Another request can then change the data between two reads, even at isolation levels
            above READ COMMITTED. On MariaDB and MySQL, a request that writes takes one more round
            trip. False: always read in a transaction. None: on PostgreSQL with asyncpg or psycopg
            at READ COMMITTED the same as True, because each statement sees its own snapshot there
            anyway. Everywhere else the same as False.
        replicas: The URLs of replicas of a PostgreSQL server, or `Replicas(...)`. A unit of work
            that may only read uses a replica that has all changes that its client has seen.
        **engine_options: Arguments for `sqlalchemy.ext.asyncio.create_async_engine`.

    Raises:
        ConfigurationError: The URL is not a database URL, or its driver is not installed, is not
            for asyncio, or does not support `autocommit_reads=True`.
    """

    is_async = True
    _create_engine = staticmethod(create_async_engine)
    _run = staticmethod(greenlet_spawn)
    _loop: asyncio.AbstractEventLoop | None = None

    @override
    def _take_session_classes(self) -> None:
        options = self._session_options
        session_class: type[AnyAsyncSession] = take_class(options, "class_", AsyncSession)
        self._guarded_class = guarded_async_class(session_class)
        options.setdefault("sync_session_class", session_class.sync_session_class)
        self._orm_class = guarded_class(take_class(options, "sync_session_class", Session))
        self._kind = AsyncDatabase

    def begin(
        self, *, join: bool = False, read_only: bool = False, after: str | None = None
    ) -> AsyncDecoratingBlock[AnyAsyncSession]:
        """Open a new unit of work: COMMIT at its end, ROLLBACK after an error or a cancellation.

        Use this block in workers, scripts and child tasks, and for rows that must be stored even if
        the request is rolled back. COMMIT and ROLLBACK are completed even if the task is cancelled.
        The block has a transaction of its own. Inside a request, do not change a row that the
        request has changed already: the block would wait for the lock of the request, and the
        request waits for the end of the block.

        Args:
            join: True to join the open unit of work, if it has this database. The block is then a
                savepoint of the session that `database.get_session()` returns. An error rolls back
                to the savepoint and is raised. After a success, the outer unit of work commits.
                `on_commit` and `set_rollback` apply to the outer unit of work. While the block is
                open, only code inside it may use the session. If no unit of work with this database
                is open, a new one is opened.
            read_only: True to refuse writes, in the session and in the database. With `join`, the
                block may only read, even if the outer unit of work may write. Without `join`, a
                replica is used if there is one. False: writes are refused only if the block joins a
                unit of work that may not write.
            after: An earlier value of `database.position`, also from another process. The value
                says which changes a client has seen. The block reads from a replica only if the
                replica has all these changes. Use `after` only together with `read_only=True`.

        Returns:
            An object for `async with` that gives a new session. The session is closed permanently
            at the end of the block. If the block joins a unit of work, the object gives the session
            of this unit of work. Inside the block, `get_session()` returns the same session. The
            object can also decorate `async def` functions.

        Raises:
            DatabaseNotRunning: The database has not been started.
            TransactionAborted: The application caught an error that aborted the transaction.
            ConcurrentUse: Another task is in a `begin(join=True)` block with the same session.
            ForbiddenWrite: The block may only read, and its code tried to write.
            ConfigurationError: An argument is wrong.
            Exception: The error of COMMIT. Nothing was stored. (If the connection was lost during
                COMMIT, it is unknown if the work was stored.)
        """
        return AsyncDecoratingBlock(lambda: self._block(after, join=join, read_only=read_only))

    @asynccontextmanager
    async def _block(
        self, after: str | None, *, join: bool, read_only: bool
    ) -> AsyncIterator[AnyAsyncSession]:
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

        A conflict is an error that another transaction causes, for example a deadlock or a
        serialization failure.

        Use this method in workers and scripts, which have no request to retry. Each attempt calls
        the whole function again, with all its effects outside of the database. There is no retry
        after the function itself has committed, by `session.commit()` or by a `begin()` block of
        any database. Each retry is logged, and starts after a random time of at most one second.

        Args:
            function: A coroutine function. In it, `get_session()` returns the session of the new
                unit of work.
            *args: The arguments for the function.
            attempts: How often the function may run, including the first time.
            retry_on: Further errors to retry in the same way as a conflict: an exception class, a
                tuple of classes, or a plain function that takes an exception and returns True or
                False.

        Returns:
            The value that the function returned, after COMMIT.

        Raises:
            DatabaseNotRunning: The database has not been started.
            ConfigurationError: An argument is wrong.
            Exception: The error of the function or of COMMIT in the last attempt.
        """
        from asgi_dbsession.retry.transaction import run_transaction

        return await run_transaction(self, function, args, attempts, retry_on)

    @override
    async def _start(self, run: Run) -> None:
        if asyncio._get_running_loop() is None:
            raise ConfigurationError(
                f"{self} works on asyncio only, and this is another event loop, such as "
                "trio. Describe it as a SyncDatabase there."
            )
        if self._owns_engine and self._loop is not None and self._loop.is_closed():
            # The event loop of the engine was closed, and no other event loop can use the engine's
            # connections. So build a new engine.
            self._forget_engine()
        await super()._start(run)

    @override
    def _build_engine(self) -> AsyncEngine:
        self._loop = asyncio._get_running_loop()
        return super()._build_engine()

    @override
    def _make_session(self, engine: AsyncEngine | None) -> ManagedSession[AnyAsyncSession]:
        session = self._guarded_class(
            bind=engine, sync_session_class=self._orm_class, **self._session_options
        )
        companion = Companion(TaskLock(self), self._reads)
        return ManagedSession(session, session.sync_session, companion, greenlet_spawn)

    @override
    def _refuse_other_loop(self) -> None:
        loop = asyncio._get_running_loop()
        # Connections of an async engine work only in the event loop that opened them. Raise no
        # error if this loop is running, if this thread runs no loop, or if there is no engine.
        if self._loop is loop or loop is None or self._engine is None:
            return
        if self._owns_engine:
            raise DatabaseNotRunning(self, other_loop=True)
        from .optional.borrowed.loop import take_to_loop

        take_to_loop(self, self._engine, loop)
