"""Checks if a database answers; parallel callers share one check."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextvars import Context
from threading import Lock, Thread
from typing import Any

from anyio import move_on_after, sleep
from sqlalchemy import Engine
from typing_extensions import override

# How many checks may still run, each in a thread, after their callers have stopped waiting.
_MAX_ABANDONED = 3
# A caller looks again and again if the thread of its check has finished. These are the first and
# the longest pause between two looks, in seconds.
_FIRST_LOOK, _LAST_LOOK = 0.0005, 0.02


class Questions(ABC):
    """The checks of one database; parallel callers share the running check."""

    @abstractmethod
    async def answers(self, engine: Any, seconds: float) -> bool:
        """Return True if the engine runs a statement within the given seconds.

        If this check takes too long, the next caller starts a new check.

        Raises:
            Exception: The exception that the statement raised.
        """


class TaskQuestions(Questions):
    """Checks an async database in a task; the task is cancelled when its last caller stops waiting.

    Args:
        ask: A coroutine function that takes an engine and runs a statement on the engine.
    """

    def __init__(self, ask: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        self._ask = ask
        self._current: tuple[object, asyncio.Task[None]] | None = None
        self._callers: dict[asyncio.Task[None], int] = {}

    @override
    async def answers(self, engine: Any, seconds: float) -> bool:
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

    def _current_or_new(self, engine: object) -> "asyncio.Task[None]":
        if self._current is not None and self._current[0] is engine:
            return self._current[1]
        # Run the check in an empty context. Some drivers would keep the context of the current
        # request in memory as long as the connection is open.
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._ask(engine), context=Context())
        task.add_done_callback(self._forget)
        self._current, self._callers[task] = (engine, task), 0
        return task

    def _leave(self, task: "asyncio.Task[None]") -> None:
        if task.done():
            return
        self._callers[task] -= 1
        if self._callers[task] == 0:
            # Do not await the cancelled task: if the server is down, the driver may need a long
            # time to end it.
            self._abandon(task)
            task.cancel()

    def _abandon(self, task: "asyncio.Task[None]") -> None:
        if self._current is not None and self._current[1] is task:
            self._current = None

    def _forget(self, task: "asyncio.Task[None]") -> None:
        self._abandon(task)
        del self._callers[task]
        if not task.cancelled():
            # Read the exception, because asyncio logs an exception that nobody reads.
            task.exception()


class ThreadQuestions(Questions):
    """Checks a blocking database in threads; threads cannot be stopped, so their number is limited.

    Callers may run on several threads and event loops, also on trio.

    Args:
        ask: A function that takes an engine and runs a statement on the engine.
    """

    def __init__(self, ask: Callable[[Engine], None]) -> None:
        self._ask = ask
        self._mutex = Lock()
        self._current: _Question | None = None
        self._abandoned = 0

    @override
    async def answers(self, engine: Engine, seconds: float) -> bool:
        question = self._current_or_new(engine)
        if question is None:
            return False
        look = _FIRST_LOOK
        with move_on_after(seconds):
            while not question.is_answered:
                await sleep(look)
                look = min(2 * look, _LAST_LOOK)
        with self._mutex:
            if not question.is_answered:
                self._abandon(question)
                return False
        if question.error is not None:
            raise question.error
        return True

    def _current_or_new(self, engine: Engine) -> "_Question | None":
        with self._mutex:
            if self._current is not None and self._current.engine is engine:
                return self._current
            # The running check is for an engine that was replaced. So start a new check for the new
            # engine.
            if self._current is not None:
                self._abandon(self._current)
            if self._abandoned >= _MAX_ABANDONED:
                return None
            question = self._current = _Question(engine)
        # Run the check in an empty context, because drivers may keep the context of the request.
        # Use a new thread, because the thread pool may be full.
        Thread(target=Context().run, args=(self._run, question), daemon=True).start()
        return question

    def _run(self, question: "_Question") -> None:
        try:
            self._ask(question.engine)
        except Exception as error:
            question.error = error
        finally:
            with self._mutex:
                question.is_answered = True
                if self._current is question:
                    self._current = None
                else:
                    self._abandoned -= 1

    def _abandon(self, question: "_Question") -> None:
        if self._current is question:
            self._current = None
            self._abandoned += 1


class _Question:
    """One check of a blocking database, which runs in a thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: Exception | None = None
        self.is_answered = False
