"""The database class for blocking engines."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from sqlalchemy import URL, Engine, create_engine, select
from sqlalchemy.orm import Session
from typing_extensions import Self, TypeVarTuple, Unpack, override

from asgi_dbsession.session.companion import Companion
from asgi_dbsession.session.guard import guarded_class
from asgi_dbsession.session.lock import current_task
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.thread_lock import ThreadLock
from asgi_dbsession.session.writes import Writes
from asgi_dbsession.types import Scope
from asgi_dbsession.unit.blocks import blocking_block_of
from asgi_dbsession.unit.retry_on import RetryOn

from .base import Database
from .decorator import DecoratingBlock
from .options import AnySession, SessionOptions
from .questions import ThreadQuestions
from .replicas import Replicas

T = TypeVar("T")
Args = TypeVarTuple("Args")


class SyncDatabase(Database[Engine, AnySession]):
    """A database with a blocking engine, for `def` handlers and drivers without asyncio support.

    Frameworks run `def` handlers in a thread pool. This package runs COMMIT in a thread outside of
    this pool. Otherwise handlers that wait for a connection could fill the pool, and the COMMIT
    that frees a connection could not run.

    Args:
        url: A database URL. A URL without a driver gets an installed driver.
        session_options: Arguments for the session class, and the class itself: `{"class_":
            MySession}`. The default of `expire_on_commit` is False.
        ping_on_startup: True to let the startup fail if the database does not answer.
        on_engine: A plain function that is called with each new `sqlalchemy.Engine` before its
            first connection. Use this function to add listeners for SQLAlchemy's events.
        autocommit_reads: True: read without a transaction until the unit of work writes. See
            `AsyncDatabase` for None and False.
        replicas: The URLs of replicas of a PostgreSQL server, or `Replicas(...)`. A unit of work
            that may only read uses a replica that has replayed all changes that its client has
            seen.
        **engine_options: Arguments for `sqlalchemy.create_engine`.

    Raises:
        ConfigurationError: The URL is not a database URL, or its driver is not installed or is for
            asyncio.
    """

    is_async = False
    _engine_class = Engine

    def __init__(
        self,
        url: str | URL,
        *,
        session_options: SessionOptions[AnySession] | None = None,
        ping_on_startup: bool = True,
        on_engine: Callable[[Engine], object] | None = None,
        autocommit_reads: bool | None = None,
        replicas: Sequence[str | URL] | Replicas = (),
        **engine_options: Any,
    ) -> None:
        options = session_options, ping_on_startup, autocommit_reads, engine_options
        super().__init__(url, *options, on_engine=on_engine)
        self._class: type[AnySession] = guarded_class(self._session_class(Session))
        self._questions = ThreadQuestions(_select_one)
        self._check_session_options()
        self._add_replicas(url, replicas, {"on_engine": on_engine} | engine_options)

    def __enter__(self) -> Self:
        """Start the database; use `with database:` in a script or worker without an event loop."""
        engine = self._begin_start()
        try:
            if self._ping_on_startup:
                _select_one(engine)
            if self._replica_set is not None:
                self._replica_set.start_here()
        except BaseException as error:
            self.__exit__(None, None, None)
            if isinstance(error, Exception):
                self._raise_failure(error)
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        engine = self._end_start()
        if engine is not None:
            engine.dispose()
        if self._replica_set is not None and not self.is_running:
            self._replica_set.shutdown_here()

    def begin(
        self, *, join: bool = False, read_only: bool = False, after: str | None = None
    ) -> DecoratingBlock[AnySession]:
        """Open a new unit of work: COMMIT on success, ROLLBACK on any error.

        The block runs on the calling thread. Everything else works as in `AsyncDatabase.begin`.

        Args:
            join: True to run in a savepoint of the open unit of work, if that unit has this
                database.
            read_only: True to refuse writes, and to use a replica, if the database has replicas.
            after: A value of the property `position`, for `read_only=True` and a database with
                replicas. The block then sees all changes that were committed before this position.

        Returns:
            A block for `with`, which gives a new session. The session is closed permanently at the
            end of the block. Inside the block, `get_sync_session()` returns this session too. The
            block is also a decorator for `def` functions.

        Raises:
            DatabaseNotRunning: The database has not been started.
            TransactionAborted: The application caught an error that aborted the transaction.
            ConcurrentUse: Another task or thread is inside `begin(join=True)` on the same session.
            ForbiddenWrite: The block may only read, and tried to write.
            Exception: The exception of COMMIT; nothing was stored.
        """
        return DecoratingBlock(lambda: self._begin(join, read_only, after))

    @contextmanager
    def _begin(self, join: bool, read_only: bool, after: str | None) -> Iterator[AnySession]:
        self._see(after, join=join, read_only=read_only)
        with blocking_block_of(self, join, read_only) as session:
            yield session

    def run_transaction(
        self,
        function: Callable[[Unpack[Args]], T],
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
            function: A plain function. Inside this function, `get_sync_session()` returns the
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
        from asgi_dbsession.retry.transaction import run_transaction_blocking

        return run_transaction_blocking(self, function, args, attempts, retry_on)

    @override
    def _make_session(
        self, engine: Engine | None, scope: Scope | None, read_only: bool
    ) -> ManagedSession[AnySession]:
        session = self._class(bind=engine, **self._session_options)
        session.info["scope"] = scope
        companion = Companion(
            ThreadLock(self, current_task()), self._reads, Writes(self, read_only)
        )
        return ManagedSession(session, session, companion, _run_in_thread)

    @override
    def _derive_session_class(self, derived: Callable[[type[Any]], type[Any]]) -> None:
        self._class = derived(self._class)

    @override
    def _create_engine(self) -> Engine:
        return create_engine(self.url, **self._engine_options)

    @override
    def _sync_engine(self, engine: Engine) -> Engine:
        return engine

    @override
    async def _select_one(self, engine: Engine) -> None:
        await _run_in_thread(_select_one, engine)

    @override
    async def _dispose(self, engine: Engine) -> None:
        await _run_in_thread(engine.dispose)


def _select_one(engine: Engine) -> None:
    pool = engine.pool
    with engine.connect() as connection:
        connection.execute(select(1))
        # The engine was disposed during the statement, so nobody would close this connection later.
        # Detach the connection from its pool: then the end of the block closes the connection.
        if engine.pool is not pool:
            connection.detach()


async def _run_in_thread(function: Callable[..., T], *args: Any) -> T:
    # Give each call its own limiter, not anyio's shared limiter. Handlers that wait for a
    # connection may fill the shared limiter. Then the COMMIT that frees a connection could not run.
    return await to_thread.run_sync(function, *args, limiter=CapacityLimiter(1))
