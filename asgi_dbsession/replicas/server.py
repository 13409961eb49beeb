"""Asks a server for its WAL position: one query at a time, whose answer all callers share."""

import asyncio
import logging
from abc import ABC, abstractmethod
from contextvars import Context
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any

from anyio import to_thread
from sqlalchemy import Engine
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet
from typing_extensions import override

from .question import IDENTITY, KEY, QUESTION, Answer

_logger = logging.getLogger("asgi_dbsession")

# Times in seconds. If the last answer is older than `_FRESH`, the server is asked again. If the
# last answer is older than `_STALE`, callers wait for the new answer, but not longer than
# `_PATIENCE`. A server that did not answer is asked again after `_PAUSE`.
_FRESH, _STALE, _PATIENCE, _PAUSE = 0.1, 0.3, 1.0, 0.5
# The time limit for a query in seconds; the time to connect to the server counts too.
_LIMIT = 5


class Server(ABC):
    """One server, primary or replica, and its last known WAL position.

    The methods are called where a session may block: in a thread, or in a greenlet of SQLAlchemy.
    If a caller is cancelled, its query continues, because other callers share the answer.

    Args:
        database: The database object of the server; units of work use its pool.
        asker: A second database object for the same server. It has one connection, for the query,
            because all connections of the first pool may be in use.
    """

    def __init__(self, database: Any, asker: Any) -> None:
        self.database: Any = database
        self.asker: Any = asker
        url = database.url
        self._address = (url.host, url.query.get("host"), url.port, url.database)
        self.chosen: int = 0  # the number of the last choice, so that equal servers take turns
        self.forget()

    def __repr__(self) -> str:
        return repr(self.database)

    def forget(self) -> None:
        """Forget all answers and the running query, after a fork or a shutdown."""
        self._mutex = Lock()
        self._question: Any = None
        self._began = 0.0
        self._last: Answer | None = None
        self._failed: float | None = None
        self._timeline = 0
        self.lost_at: float = 0.0
        self.name: str | None = None

    @property
    def engine(self) -> Engine:
        """The engine that units of work use to talk to this server."""
        engine: Any = self.database.engine
        sync_engine: Engine = getattr(engine, "sync_engine", engine)
        return sync_engine

    @property
    def checked_out(self) -> int:
        """How many connections to this server are in use now."""
        pool: Any = self.engine.pool
        return pool.checkedout() if hasattr(pool, "checkedout") else 0

    def current(self, now: float) -> Answer | None:
        """Return the last answer of the server; None if the server does not answer.

        Wait for a new answer only if the last answer is too old.
        """
        last = self._last
        if self._failed is not None:
            if now - self._failed > _PAUSE:
                self.ask()
            return None
        if last is None or now - last.asked > _STALE:
            return self.answer_since(now - _STALE)
        if now - last.asked > _FRESH:
            self.ask()
        return last

    def answer_since(self, moment: float) -> Answer | None:
        """Return the answer to a query sent after `moment`; None if the server is too slow."""
        while True:
            with self._mutex:
                if self._last is not None and self._last.asked >= moment:
                    return self._last
                if self._failed is not None and self._failed >= moment:
                    return None
            question = self.ask()
            left = self._began + _PATIENCE - monotonic()
            if left <= 0 or not self._wait(question, left):
                return None

    def lost(self) -> None:
        """Record that a connection to the server was lost, or could not be made."""
        self._fail(monotonic(), "a connection was lost")
        self.ask()

    def ask(self) -> Any:
        """Send the query for the WAL position if none is running; do not wait for the answer."""
        with self._mutex:
            if self._question is None:
                self._began = monotonic()
                self._question = self._begin()
            return self._question

    def _answered(self, row: Any, identity: Any) -> None:
        answer = Answer.of(row, identity, self._began, self._timeline, self._address)
        with self._mutex:
            self._last, self._timeline = answer, answer.position.timeline
            self.name = answer.name
            was_lost, self._failed = self._failed is not None, None
        if was_lost:
            _logger.info("%s answers again", self)

    def _fail(self, moment: float, reason: object) -> None:
        with self._mutex:
            was_lost, self._failed, self._last = self._failed is not None, moment, None
            self.lost_at = monotonic()
        if not was_lost:
            _logger.warning("%s is not read from until it answers: %s", self, reason)

    def _unanswered(self, error: BaseException) -> None:
        reason = type(error).__name__  # without the driver's text, which may contain a secret
        self._fail(self._began, reason)

    @abstractmethod
    def _begin(self) -> Any: ...

    @abstractmethod
    def _wait(self, question: Any, seconds: float) -> bool: ...

    @abstractmethod
    async def stop(self) -> None:
        """At shutdown, wait until the query for the WAL position of the server has ended."""


class TaskServer(Server):
    """A server of an `AsyncDatabase`; the query for its WAL position runs in a task."""

    @override
    def _begin(self) -> "asyncio.Task[None]":
        # Run the query in an empty context. Some drivers would keep the context of the current
        # request in memory as long as the connection is open.
        return asyncio.get_running_loop().create_task(self._ask(), context=Context())

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(_LIMIT), self.asker.engine.connect() as connection:
                ask, info = connection.exec_driver_sql, connection.info
                identity = info[KEY] = info.get(KEY) or (await ask(IDENTITY)).one()
                row = (await ask(QUESTION)).one()
            self._answered(row, identity)
        except Exception as error:
            self._unanswered(error)
        finally:
            self._question = None

    @override
    def _wait(self, question: "asyncio.Task[None]", seconds: float) -> bool:
        # The application itself has called `get_bind`, and there nothing can be awaited.
        if not in_greenlet():
            return False
        await_only(asyncio.wait([question], timeout=seconds))
        return question.done()

    @override
    async def stop(self) -> None:
        question: asyncio.Task[None] | None = self._question
        if question is not None and question.get_loop() is asyncio.get_running_loop():
            question.cancel()
            await asyncio.wait([question])
        self.forget()


class ThreadServer(Server):
    """A server of a `SyncDatabase`; the query for its WAL position runs in a thread."""

    @override
    def _begin(self) -> Event:
        done = Event()
        # Run the query in an empty context, because drivers may keep the context of the request.
        # Use a new thread, because all threads of the thread pool may be busy.
        Thread(target=Context().run, args=(self._ask, done), daemon=True).start()
        return done

    def _ask(self, done: Event) -> None:
        try:
            engine: Engine = self.asker.engine
            with engine.connect() as connection:
                ask, info = connection.exec_driver_sql, connection.info
                identity = info[KEY] = info.get(KEY) or ask(IDENTITY).one()
                row = ask(QUESTION).one()
            self._answered(row, identity)
        except Exception as error:
            self._unanswered(error)
        finally:
            self._question = None
            done.set()

    @override
    def _wait(self, question: Event, seconds: float) -> bool:
        return question.wait(seconds)

    @override
    async def stop(self) -> None:
        await to_thread.run_sync(self.stop_here)

    def stop_here(self) -> None:
        """Wait on the calling thread until the running query for the WAL position has ended."""
        question: Event | None = self._question
        if question is not None:
            question.wait(_PATIENCE)
        self.forget()
