"""The class `SyncDatabase`, for engines with a sync driver."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session
from typing_extensions import Self, TypeVarTuple, Unpack, override

from asgi_dbsession.session.companion import Companion
from asgi_dbsession.session.completion import call_here, complete_here
from asgi_dbsession.session.guard import guarded_class
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.session.tasks import current_task
from asgi_dbsession.session.thread_lock import ThreadLock
from asgi_dbsession.types import RetryOn
from asgi_dbsession.unit.blocks import blocking_block_of

from .base import Database
from .decorator import DecoratingBlock
from .engines import run_in_thread
from .options import AnySession, SessionOptions, take_class

T = TypeVar("T")
Args = TypeVarTuple("Args")


class SyncDatabase(Database[Engine, AnySession, SessionOptions[AnySession]]):
    """A database with a sync engine, for `def` handlers and for drivers without asyncio support.

    Frameworks run `def` handlers in a pool of threads. This package runs COMMIT in a thread outside
    of this pool. Otherwise handlers that wait for a database connection could occupy all threads of
    the pool. Then the COMMIT that frees a connection would have no thread.

    Args:
        url: A database URL. If it names no driver, a sync driver that is installed is used.
        session_options: Arguments for the sessions, for example `{"class_": MySession}` for their
            class. `expire_on_commit` is False by default.
        ping_on_startup: True if the startup must fail when the database does not answer.
        on_engine: A plain function that is called with each new `sqlalchemy.Engine` before its
            first connection. It can add listeners for SQLAlchemy's events to the engine.
        autocommit_reads: True: a request or `begin()` block reads without a transaction until it
            sends a statement that may write. This needs psycopg or PyMySQL. Another request can
            then change the data between two reads, even at isolation levels above READ COMMITTED.
            On MariaDB and MySQL, a request that writes takes one more round trip. False: always
            read in a transaction. None: on PostgreSQL with psycopg at READ COMMITTED the same as
            True, because each statement sees its own snapshot there anyway. Everywhere else the
            same as False.
        replicas: The URLs of replicas of a PostgreSQL server, or `Replicas(...)`. A unit of work
            that may only read uses a replica that has all changes that its client has seen.
        **engine_options: Arguments for `sqlalchemy.create_engine`.

    Raises:
        ConfigurationError: The URL is not a database URL, or its driver is not installed, is for
            asyncio, or does not support `autocommit_reads=True`.
    """

    is_async = False
    _create_engine = staticmethod(create_engine)
    _run = staticmethod(run_in_thread)

    @override
    def _take_session_classes(self) -> None:
        self._orm_class = guarded_class(take_class(self._session_options, "class_", Session))
        self._kind = SyncDatabase

    def __enter__(self) -> Self:
        """Start the database; for `with database:` in a script or worker without an event loop."""
        complete_here(self._start(call_here))
        return self

    def __exit__(self, *_: object) -> None:
        complete_here(self._stop(call_here))

    def begin(
        self, *, join: bool = False, read_only: bool = False, after: str | None = None
    ) -> DecoratingBlock[AnySession]:
        """Open a new unit of work: COMMIT at its end, ROLLBACK after an error.

        The block runs on the calling thread. For all other details see `AsyncDatabase.begin`.

        Args:
            join: True to run in a savepoint of the open unit of work, if it has this database.
            read_only: True to refuse writes, and to use a replica if there is one.
            after: An earlier value of `database.position`, also from another process. The value
                says which changes a client has seen. The block reads from a replica only if the
                replica has all these changes. Use `after` only together with `read_only=True`.

        Returns:
            An object for `with` that gives a new session. The session is closed permanently at the
            end of the block. If the block joins a unit of work, the object gives the session of
            this unit of work. Inside the block, `get_sync_session()` returns the same session. The
            object can also decorate `def` functions.

        Raises:
            DatabaseNotRunning: The database has not been started.
            TransactionAborted: The application caught an error that aborted the transaction.
            ConcurrentUse: Another task or thread is in a `begin(join=True)` block with the same
                session.
            ForbiddenWrite: The block may only read, and its code tried to write.
            ConfigurationError: An argument is wrong.
            Exception: The error of COMMIT. Nothing was stored. (If the connection was lost during
                COMMIT, it is unknown if the work was stored.)
        """

        def open_block() -> AbstractContextManager[AnySession]:
            self._see(after, join=join, read_only=read_only)
            return blocking_block_of(self, join, read_only)

        return DecoratingBlock(open_block)

    def run_transaction(
        self,
        function: Callable[[Unpack[Args]], T],
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
            function: A plain function. In it, `get_sync_session()` returns the session of the new
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
        from asgi_dbsession.retry.transaction import run_transaction_blocking

        return run_transaction_blocking(self, function, args, attempts, retry_on)

    @override
    def _make_session(self, engine: Engine | None) -> ManagedSession[AnySession]:
        session = self._orm_class(bind=engine, **self._session_options)
        companion = Companion(ThreadLock(self, current_task()), self._reads)
        return ManagedSession(session, session, companion, run_in_thread)
