"""Asks a server of a `SyncDatabase` for its WAL position, in a thread."""

from contextvars import Context
from threading import Event, Thread
from time import monotonic
from typing import Any

from typing_extensions import override

from asgi_dbsession.unit.together import Run

from .question import IDENTITY, KEY, QUESTION
from .server import LIMIT, PATIENCE, Server


class ThreadServer(Server):
    """A server of a `SyncDatabase`. The query for its WAL position runs in a thread."""

    @override
    def ask(self) -> Any:
        with self._mutex:
            self._overdue = tuple(each for each in self._overdue if not each.is_set())
            # If the running query exceeds its time limit, ask the server again in another thread.
            # The old thread cannot be stopped, and may wait for hours. So for each old thread that
            # still waits, double the time limit: 5, 10, 20 seconds. This keeps the threads few.
            limit = LIMIT * 2 ** len(self._overdue)
            gives_up = self._question is not None and monotonic() - self._began > limit
            if gives_up:
                self._overdue, self._question = (*self._overdue, self._question), None
                # The old query occupies the only connection of the pool. So let the engine have a
                # new pool for the next query.
                self.asker.engine.dispose(close=False)
        if gives_up:
            self._fail(monotonic(), "TimeoutError")
        return super().ask()

    @override
    def _begin(self) -> Event:
        done = Event()
        # Use a new thread, because all threads of a pool may be busy. Use an empty context, because
        # a driver could keep the context variables of a request in memory.
        Thread(target=Context().run, args=(self._ask, done), daemon=True).start()
        return done

    def _ask(self, done: Event) -> None:
        try:
            with self.asker.engine.connect() as connection:
                ask, info = connection.exec_driver_sql, connection.info
                identity = info[KEY] = info.get(KEY) or ask(IDENTITY).one()
                row = ask(QUESTION).one()
                if not self._waits_for(done):
                    connection.invalidate()
                    return
            self._answered(row, identity)
        except Exception as error:
            if self._waits_for(done):
                self._unanswered(error)
        finally:
            with self._mutex:
                if self._question is done:
                    self._question = None
            done.set()

    def _waits_for(self, done: Event) -> bool:
        """Return False if the query has exceeded the time limit, so that its answer is too old."""
        with self._mutex:
            return self._question is done

    @override
    def _wait(self, question: Event, seconds: float) -> bool:
        return question.wait(seconds)

    @override
    async def stop(self, run: Run) -> None:
        question: Event | None = self._question
        if question is not None:
            await run(question.wait, PATIENCE)
        self.forget()
