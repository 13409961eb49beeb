"""Rolls back everything that a test has written to the databases of an application."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from types import TracebackType
from typing import Any, TypeAlias

from anyio import to_thread
from sqlalchemy import Engine
from sqlalchemy.util import greenlet_spawn

from asgi_dbsession.database.arguments import check_number
from asgi_dbsession.database.async_database import AsyncDatabase
from asgi_dbsession.database.listeners import prepare
from asgi_dbsession.database.sync_database import SyncDatabase
from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.session._sqlalchemy import original_engine
from asgi_dbsession.session.completion import run_to_completion

from .engine import check_databases, engines_of, home_of, share, unshare
from .isolation import Isolation
from .pool import SharedPool
from .sessions import enter_block, leave_block, watch_sessions
from .transaction import current_caller

AnyDatabase: TypeAlias = AsyncDatabase[Any] | SyncDatabase[Any]


def rolled_back(*databases: AnyDatabase, timeout: float = 10) -> "RolledBack":
    """Roll back all work of a test, and of the application under test, at the end of the block.

    All transactions on a database share one connection, which is never committed. Each transaction
    is a savepoint. COMMIT only releases this savepoint, so later transactions see the work until
    the block ends. If a deferred constraint would make a real COMMIT fail, this COMMIT fails too.

    Transactions of different requests run one after the other. A transaction runs inside another
    one only if the test itself, or the same request, has another transaction open.

    In `async def` tests, write `async with`, which also starts the databases. In `def` tests, write
    `with`, inside or around Starlette's `with TestClient(app):`. The test client starts each
    `AsyncDatabase`, and `rolled_back` starts each `SyncDatabase`.

    Engines in `session_options["binds"]` are included. A session that uses any other engine (from
    its own `get_bind`, for example) gets an error. To include that engine too, add
    `from_engine(engine)` to `databases`. Tasks, threads, schedulers and sessions that use a
    database after the block get an error too. Sequences and AUTO_INCREMENT keep their last number.

    Args:
        *databases: The databases of the application: the same objects that its middleware has. The
            application itself needs no change.
        timeout: For how many seconds a transaction waits until another transaction has ended.

    Returns:
        An object for `with` or `async with`, which can be used only once.

    Raises:
        NotIsolated: The one connection cannot do what several connections do in production. For
            example, a rollback would also undo another transaction, which was committed inside it.
            Or the connection was lost. Or MariaDB committed by itself (CREATE TABLE, for example).
            Or COMMIT was sent on the driver's own connection. The request gets this error, or the
            end of the block raises this error.
        ConfigurationError: No database was given, or `timeout` is not a number of seconds. Or a
            database is in a `rolled_back` block already. Or `with` was used in an `async def`
            function.
        DatabaseUnavailable: A database did not answer.
    """
    check_databases("rolled_back", databases)
    check_number("timeout", timeout, 0, seconds=True)
    return RolledBack(databases, timeout)


class RolledBack(AbstractContextManager[None], AbstractAsyncContextManager[None]):
    """A `with` or `async with` block for a test. At its end, all work of the test is rolled back.

    The function `rolled_back` returns an object of this class.
    """

    def __init__(self, databases: tuple[AnyDatabase, ...], timeout: float) -> None:
        self._databases = databases
        self._timeout = timeout
        self._inside: AbstractContextManager[None] = self._in_thread()
        self._inside_loop: AbstractAsyncContextManager[None] = self._in_loop()

    def __enter__(self) -> None:
        self._inside.__enter__()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._inside.__exit__(exc_type, exc_value, traceback)

    async def __aenter__(self) -> None:
        await self._inside_loop.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._inside_loop.__aexit__(exc_type, exc_value, traceback)

    @contextmanager
    def _in_thread(self) -> Iterator[None]:
        if asyncio._get_running_loop() is not None:
            raise ConfigurationError(
                "`with rolled_back(…)` is for tests and fixtures written with `def`: write "
                "`async with rolled_back(…)` here."
            )
        isolation = Isolation(self._timeout, current_caller())
        with _raising_violations(isolation), ExitStack() as stack:
            for database in self._databases:
                stack.enter_context(_sharing(database, isolation))
                stack.callback(_unshare, database)
                if isinstance(database, SyncDatabase):
                    stack.enter_context(database)
            with _in_block(isolation):
                yield

    @asynccontextmanager
    async def _in_loop(self) -> AsyncIterator[None]:
        isolation = Isolation(self._timeout, current_caller())
        with _raising_violations(isolation):
            async with AsyncExitStack() as stack:
                for database in self._databases:
                    stack.enter_context(_sharing(database, isolation))
                    stack.push_async_callback(_unshare_async, database)
                    await stack.enter_async_context(database)
                with _in_block(isolation):
                    yield


@contextmanager
def _sharing(database: AnyDatabase, isolation: Isolation) -> Iterator[None]:
    if database._prepare is not prepare:
        raise ConfigurationError(
            f"{database} is inside of `rolled_back` already: use it once for each test."
        )
    watch_sessions(database, isolation)
    for engine in engines_of(database):
        _share_once(engine, isolation)

    def prepare_and_share(engine: Engine) -> None:
        prepare(engine)
        _share_once(engine, isolation)

    database._prepare = prepare_and_share
    database._reads.is_shared = True
    try:
        yield
    finally:
        # Usually, the end of the test has set `has_ended` already. But if a database failed to
        # start, the test has never begun, so set `has_ended` here.
        isolation.has_ended = True
        database._prepare = prepare
        database._reads.is_shared = False


def _share_once(engine: Engine, isolation: Isolation) -> None:
    """Let all transactions of an engine share one connection, which the test can roll back.

    If two databases of a test have the same engine, the second call does nothing.
    """
    pool = original_engine(engine).pool
    if not (isinstance(pool, SharedPool) and pool.isolation is isolation):
        share(original_engine(engine), isolation)


@contextmanager
def _in_block(isolation: Isolation) -> Iterator[None]:
    enter_block(isolation)
    try:
        yield
    finally:
        leave_block(isolation)


@contextmanager
def _raising_violations(isolation: Isolation) -> Iterator[None]:
    # `violations` are errors about code that would behave differently in production. Raise the
    # first of them only after all work of the test was rolled back, because the rollback may find a
    # violation too.
    try:
        yield
    except BaseException as error:
        for each in isolation.violations:
            error.add_note(str(each))
        raise
    if isolation.violations:
        raise isolation.violations[0]


def _unshare(database: AnyDatabase) -> None:
    for engine in engines_of(database):
        loop = home_of(engine)
        if loop is None:
            unshare(engine)
        # The shared connection belongs to an event loop in another thread (of the test client). Run
        # `unshare` in that event loop.
        elif loop.is_running():
            asyncio.run_coroutine_threadsafe(greenlet_spawn(unshare, engine), loop).result()
        elif not loop.is_closed():
            loop.run_until_complete(greenlet_spawn(unshare, engine))


async def _unshare_async(database: AnyDatabase) -> None:
    for engine in engines_of(database):
        if home_of(engine) is None:
            await to_thread.run_sync(unshare, engine)
        else:
            await run_to_completion(greenlet_spawn(unshare, engine))
