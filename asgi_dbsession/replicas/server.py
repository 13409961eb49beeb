"""Asks a server for its WAL position. Requests that need it at the same time share one query."""

import asyncio
import logging
from abc import ABC, abstractmethod
from contextvars import Context
from threading import Lock
from time import monotonic
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet
from typing_extensions import override

from asgi_dbsession.database.engines import sync_engine_of
from asgi_dbsession.unit.together import Run

from .question import IDENTITY, KEY, QUESTION, Answer

_logger = logging.getLogger("asgi_dbsession")

# A server is asked for its WAL position again `_FRESH` seconds after its last answer, or `_PAUSE`
# seconds after it did not answer.
_FRESH, _PAUSE = 0.1, 0.5
# If a server last reported its WAL position more than `_STALE` seconds ago, requests wait until it
# reports its position again, for at most `PATIENCE` seconds.
_STALE, PATIENCE = 0.3, 1.0
# The time limit in seconds for connecting to a server and asking for its WAL position.
LIMIT = 5


class Server(ABC):
    """One server (the primary or a replica), with its last reported WAL position.

    The methods may block: call them in a thread, or in a greenlet of SQLAlchemy. `asker` has one
    more connection to the server, which only asks for the WAL position.
    """

    def __init__(self, database: Any, asker: Any) -> None:
        self.database: Any = database
        self.asker: Any = asker
        url = database.url
        self._address = (url.host, url.query.get("host"), url.port, url.database)
        # The number of the last choice of this replica. Each choice gets a higher number. Of
        # equally busy replicas, the one chosen longest ago is chosen next.
        self.chosen: int = 0
        self.forget()

    def __repr__(self) -> str:
        return repr(self.database)

    def forget(self) -> None:
        """Forget what the server has answered, and the running query for its WAL position.

        Called in a child process after a fork, and at shutdown.
        """
        self._mutex = Lock()
        self._question: Any = None
        # The queries that have exceeded the time limit, and may still run (see `ThreadServer`).
        self._overdue: tuple[Any, ...] = ()
        self._began = 0.0
        self._last: Answer | None = None
        self._failed: float | None = None
        self._timeline = 0
        self.lost_at: float = 0.0
        self.name: str | None = None

    @property
    def engine(self) -> Engine:
        """The engine of the sessions that use this server."""
        return sync_engine_of(self.database.engine)

    @property
    def checked_out(self) -> int:
        """How many connections to this server are in use now."""
        pool: Any = self.engine.pool
        return pool.checkedout() if hasattr(pool, "checkedout") else 0

    def current(self, now: float) -> Answer | None:
        """Return what the server last answered when it was asked for its WAL position.

        None if the server does not answer. This waits for a new answer only if the last answer is
        too old.
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
        """Return a WAL position of the server that is not older than `moment`.

        If the last known position is older, ask the server, and wait for at most one second. Return
        None if the server does not answer. `moment` is a time of Python's `monotonic`.
        """
        while True:
            with self._mutex:
                if self._last is not None and self._last.asked >= moment:
                    return self._last
                if self._failed is not None and self._failed >= moment:
                    return None
            question = self.ask()
            left = self._began + PATIENCE - monotonic()
            if left <= 0 or not self._wait(question, left):
                return None

    def lost(self) -> None:
        """Called if a connection fails: let no request read from this server until it answers."""
        self._fail(monotonic(), "a connection was lost")
        self.ask()

    def ask(self) -> Any:
        """Start the query for the WAL position, unless it is running. Do not wait for its end."""
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
            _logger.warning("No request reads from %s until it answers: %s", self, reason)

    def _unanswered(self, error: BaseException) -> None:
        # Log only the class of the driver's error, because its message may contain a secret.
        reason = type(error).__name__
        self._fail(self._began, reason)

    @abstractmethod
    def _begin(self) -> Any: ...

    @abstractmethod
    def _wait(self, question: Any, seconds: float) -> bool: ...

    @abstractmethod
    async def stop(self, run: Run) -> None:
        """End the running query for the WAL position, if there is one. Called at shutdown.

        A query in a task is cancelled. A query in a thread cannot be cancelled, so wait for it, at
        most for a second.

        Args:
            run: A function that calls blocking code: in a greenlet, in a thread, or directly.
        """


class TaskServer(Server):
    """A server of an `AsyncDatabase`. The query for its WAL position runs in a task."""

    @override
    def _begin(self) -> "asyncio.Task[None]":
        # Run the query in an empty context. In the context of a request, some drivers would keep
        # all context variables of this request in memory as long as the connection is open.
        return asyncio.get_running_loop().create_task(self._ask(), context=Context())

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(LIMIT), self.asker.engine.connect() as connection:
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
        # Wait until the server has answered with its WAL position. Only code in a greenlet of
        # SQLAlchemy can wait here. Without a greenlet (the application calls `session.get_bind()`
        # itself), return False, as if the server had not answered in time.
        if not in_greenlet():
            return False
        await_only(asyncio.wait([question], timeout=seconds))
        return question.done()

    @override
    async def stop(self, run: Run) -> None:
        question: asyncio.Task[None] | None = self._question
        if question is not None and question.get_loop() is asyncio.get_running_loop():
            question.cancel()
            await asyncio.wait([question])
        self.forget()
