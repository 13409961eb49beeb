"""A database in which everything that a test does is rolled back at its end."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
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

from asgi_dbsession.database.async_database import AsyncDatabase
from asgi_dbsession.database.base import Database
from asgi_dbsession.database.sync_database import SyncDatabase
from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.session.completion import run_to_completion
from asgi_dbsession.session.failures import watch

from .engine import home_of, share, unshare

AnyDatabase: TypeAlias = AsyncDatabase[Any] | SyncDatabase[Any]


def rolled_back(*databases: AnyDatabase, timeout: float = 10) -> "RolledBack":
    """Let a test do to databases what it likes, and find them afterwards as they were.

    All transactions on a database share one connection, which is never committed: each is a
    savepoint. So a COMMIT stores for the rest of the test, fails where it would fail (deferred
    constraints included), and later transactions see it, be they of a request or of the test.

    Transactions of different requests take turns. One that begins while the test itself, outside
    of any request, has one open, or inside of another one of its request, is nested in it.

    `async with` also starts the databases, for clients that send no lifespan. Plain `with`, for
    tests written with `def`, leaves that to Starlette's `with TestClient(app):`, inside of it or
    around; it starts a `SyncDatabase`, too.

    Args:
        *databases: Those of the application; nothing else of it needs to change.
        timeout: Seconds that a transaction waits for its turn.

    Returns:
        A context manager for one use; in a coroutine it must be `async with`.

    Raises:
        NotIsolated: In a request, as well as at the end of the block: the outcome would have been
            another one on several connections. Or the connection was lost, or MariaDB has
            committed by itself.
        ConfigurationError: A database is inside of such a block already; or `with` in a coroutine.
        DatabaseUnavailable: A database did not answer.
    """
    return RolledBack(databases, timeout)


class RolledBack(AbstractContextManager[None], AbstractAsyncContextManager[None]):
    """What `rolled_back` returns."""

    def __init__(self, databases: tuple[AnyDatabase, ...], timeout: float) -> None:
        self._databases = databases
        self._timeout = timeout
        self._falsified: list[Exception] = []
        self._engines: set[Engine] = set()
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
        with ExitStack() as stack:
            for database in self._databases:
                stack.enter_context(self._sharing(database))
                stack.callback(_unshare, database)
                if isinstance(database, SyncDatabase):
                    _run(database.startup())
                    stack.callback(_shut_down, database)
            with self._reporting():
                yield

    @asynccontextmanager
    async def _in_loop(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for database in self._databases:
                stack.enter_context(self._sharing(database))
                stack.push_async_callback(_unshare_async, database)
                await stack.enter_async_context(database)
            with self._reporting():
                yield

    @contextmanager
    def _sharing(self, database: AnyDatabase) -> Iterator[None]:
        if database._prepare is not watch:
            raise ConfigurationError(
                f"{database} is inside of `rolled_back` already: use it once for each test."
            )
        engine = _sync_engine(database)
        if engine is not None:
            self._share(engine)

        def prepare(engine: Engine) -> None:
            watch(engine)
            self._share(engine)

        database._prepare = prepare
        try:
            yield
        finally:
            database._prepare = watch

    def _share(self, engine: Engine) -> None:
        if engine not in self._engines:  # several databases may be made from one engine
            share(engine, self._timeout, self._falsified)
            self._engines.add(engine)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            for each in self._falsified:
                error.add_note(str(each))
            raise
        if self._falsified:
            raise self._falsified[0]


def _sync_engine(database: Database[Any, Any]) -> Engine | None:
    return None if database._engine is None else database._sync_engine(database._engine)


def _unshare(database: AnyDatabase) -> None:
    engine = _sync_engine(database)
    if engine is None:
        return
    loop = home_of(engine)
    if loop is None:
        unshare(engine)
    elif loop.is_running():  # in another thread, which serves the application
        asyncio.run_coroutine_threadsafe(greenlet_spawn(unshare, engine), loop).result()
    elif not loop.is_closed():
        loop.run_until_complete(greenlet_spawn(unshare, engine))


async def _unshare_async(database: AnyDatabase) -> None:
    if isinstance(database, SyncDatabase):
        await to_thread.run_sync(_unshare, database)
    elif (engine := _sync_engine(database)) is not None:
        await run_to_completion(greenlet_spawn(unshare, engine))


def _shut_down(database: AnyDatabase) -> None:
    _run(database.shutdown())


def _run(work: Coroutine[Any, Any, None]) -> None:
    # Not `asyncio.run`: it would take away the event loop that a plugin has set for its tests.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(work)
