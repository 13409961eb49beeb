"""Checks if an engine's database answers; callers at the same time share one check."""

import asyncio
from concurrent.futures import Future
from contextvars import Context
from threading import Lock, Thread

from anyio import move_on_after, sleep
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from asgi_dbsession.database.engines import select_one

# At most this many threads check one database at the same time. A thread with a blocking driver
# cannot be stopped.
_MAX_RUNNING = 3
# While a thread waits for the database, a coroutine looks again and again if the thread has ended.
# The first and the longest pause between two looks, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02


class TaskQuestions:
    """Checks in a task if an async database answers, by sending it a statement.

    Callers at the same time wait for the same task. If no caller waits any more, this task is
    cancelled.
    """

    def __init__(self) -> None:
        self._current: tuple[AsyncEngine, asyncio.Task[None]] | None = None
        self._callers: dict[asyncio.Task[None], int] = {}

    async def answers(self, engine: AsyncEngine, seconds: float) -> bool:
        """Return True if the database answers a SELECT within the given seconds.

        Callers at the same time share one SELECT. If the SELECT takes longer than `seconds`, return
        False. The next caller then sends a new SELECT.

        Raises:
            Exception: The error of the SELECT, or of connecting to the database.
        """
        task = self._current_or_new(engine)
        self._callers[task] += 1
        try:
            await asyncio.wait([task], timeout=seconds)
            if not task.done():
                self._abandon(task)
                return False
            return not task.cancelled() and task.result() is None
        finally:
            self._leave(task)

    def _current_or_new(self, engine: AsyncEngine) -> "asyncio.Task[None]":
        if self._current is not None and self._current[0] is engine:
            return self._current[1]
        # Run the check in an empty context. In the context of a request, some drivers would keep
        # all context variables of this request in memory as long as the connection is open.
        loop = asyncio.get_running_loop()
        asking = greenlet_spawn(select_one, engine.sync_engine, engine.pool)
        task = loop.create_task(asking, context=Context())
        task.add_done_callback(self._forget)
        self._current, self._callers[task] = (engine, task), 0
        return task

    def _leave(self, task: "asyncio.Task[None]") -> None:
        if task.done():
            return
        self._callers[task] -= 1
        if self._callers[task] == 0:
            # Do not wait for the cancelled task, because the driver may need long to end it if the
            # server is down.
            self._abandon(task)
            task.cancel()

    def _abandon(self, task: "asyncio.Task[None]") -> None:
        if self._current is not None and self._current[1] is task:
            self._current = None

    def _forget(self, task: "asyncio.Task[None]") -> None:
        self._abandon(task)
        del self._callers[task]
        if not task.cancelled():
            # Read the exception. Otherwise asyncio would log that the exception was never
            # retrieved.
            task.exception()


class ThreadQuestions:
    """Checks in threads if a database with a sync driver answers. The number of threads is limited.

    A thread with a blocking driver cannot be stopped. Callers may be on several threads and event
    loops, of asyncio and of trio.
    """

    def __init__(self) -> None:
        self._mutex = Lock()
        self._current: tuple[Engine, Future[None]] | None = None
        self._running = 0

    async def answers(self, engine: Engine, seconds: float) -> bool:
        """Return True if the database answers a SELECT within the given seconds.

        Callers at the same time share one SELECT. If the SELECT takes longer than `seconds`, return
        False. The next caller then sends a new SELECT. If too many earlier SELECTs are still
        running, return False at once.

        Raises:
            Exception: The error of the SELECT, or of connecting to the database.
        """
        answer = self._current_or_new(engine)
        if answer is None:
            return False
        pause = _FIRST_PAUSE
        with move_on_after(seconds):
            while not answer.done():
                await sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        with self._mutex:
            if not answer.done():
                self._forget(answer)
                return False
        return answer.result() is None

    def _current_or_new(self, engine: Engine) -> "Future[None] | None":
        with self._mutex:
            if self._current is not None and self._current[0] is engine:
                return self._current[1]
            # The threads of earlier checks may still run, although nobody waits for them any more.
            # If too many of them run, do not start another check.
            if self._running >= _MAX_RUNNING:
                return None
            answer: Future[None] = Future()
            self._current = engine, answer
            self._running += 1
        # Use an empty context (`contextvars`), because a driver could keep the request's context in
        # memory. Use a new thread, because all threads of a pool may be busy.
        Thread(target=Context().run, args=(self._run, engine, answer), daemon=True).start()
        return answer

    def _run(self, engine: Engine, answer: "Future[None]") -> None:
        failure: Exception | None = None
        try:
            select_one(engine, engine.pool)
        except Exception as error:
            failure = error
        finally:
            with self._mutex:
                # If the database has answered, `failure` is None, and the waiting callers get no
                # exception.
                answer.set_exception(failure)
                self._forget(answer)
                self._running -= 1

    def _forget(self, answer: "Future[None]") -> None:
        if self._current is not None and self._current[1] is answer:
            self._current = None
