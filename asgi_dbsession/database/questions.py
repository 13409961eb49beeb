"""The question whether a database answers: asked once for all who want to know."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextvars import Context
from threading import Lock, Thread
from typing import Any

from anyio import move_on_after, sleep
from sqlalchemy import Engine
from typing_extensions import override

# How many threads may wait for an answer that no caller waits for any more.
_MAX_GIVEN_UP = 3
# Seconds between two looks at a thread: at first, and at most.
_FIRST_LOOK, _LAST_LOOK = 0.0005, 0.02


class Questions(ABC):
    """The questions to one database. Callers share the one that is under way."""

    @abstractmethod
    async def answers(self, engine: Any, seconds: float) -> bool:
        """Whether the engine runs a statement in that time.

        A caller that waits in vain gives the question up: later callers ask another one.

        Raises:
            Exception: Whatever the statement raised.
        """


class TaskQuestions(Questions):
    """Asked by a task. A question that the last caller gives up is cancelled.

    Args:
        ask: Runs a statement.
    """

    def __init__(self, ask: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        self._ask = ask
        self._current: tuple[object, asyncio.Task[None]] | None = None
        self._callers: dict[asyncio.Task[None], int] = {}

    @override
    async def answers(self, engine: Any, seconds: float) -> bool:
        task = self._join(engine)
        self._callers[task] += 1
        try:
            await asyncio.wait([task], timeout=seconds)
            if not task.done():
                self._give_up(task)
                return False
            return not task.cancelled() and task.result() is None
        finally:
            self._leave(task)

    def _join(self, engine: object) -> "asyncio.Task[None]":
        if self._current is not None and self._current[0] is engine:
            return self._current[1]
        # Without the context of this request: some drivers keep it for as long as the connection.
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
            # Not waited for: a connection to a server that is gone takes a while to give up.
            self._give_up(task)
            task.cancel()

    def _give_up(self, task: "asyncio.Task[None]") -> None:
        if self._current is not None and self._current[1] is task:
            self._current = None

    def _forget(self, task: "asyncio.Task[None]") -> None:
        self._give_up(task)
        del self._callers[task]
        if not task.cancelled():
            task.exception()  # or asyncio would complain that nobody asked


class ThreadQuestions(Questions):
    """Asked by a thread, which nothing can stop: so only a few of them are given up.

    Callers may be on several threads and event loops, trio's included.

    Args:
        ask: Runs a statement.
    """

    def __init__(self, ask: Callable[[Engine], None]) -> None:
        self._ask = ask
        self._mutex = Lock()
        self._current: _Question | None = None
        self._given_up = 0

    @override
    async def answers(self, engine: Engine, seconds: float) -> bool:
        question = self._join(engine)
        if question is None:
            return False
        look = _FIRST_LOOK
        with move_on_after(seconds):
            while not question.is_answered:
                await sleep(look)
                look = min(2 * look, _LAST_LOOK)
        with self._mutex:
            if not question.is_answered:
                self._give_up(question)
                return False
        if question.error is not None:
            raise question.error
        return True

    def _join(self, engine: Engine) -> "_Question | None":
        with self._mutex:
            if self._current is not None and self._current.engine is engine:
                return self._current
            if self._current is not None:  # of an engine that has been replaced
                self._give_up(self._current)
            if self._given_up >= _MAX_GIVEN_UP:
                return None
            question = self._current = _Question(engine)
        # Without the context of this request; not one of the pool's threads, which may be few.
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
                    self._given_up -= 1

    def _give_up(self, question: "_Question") -> None:
        if self._current is question:
            self._current = None
            self._given_up += 1


class _Question:
    """A question that a thread asks."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: Exception | None = None
        self.is_answered = False
