"""Records the statements, COMMITs and ROLLBACKs of a session, and its waits for a connection."""

from time import perf_counter
from typing import Any

from sqlalchemy import Connection, Engine

from asgi_dbsession.session.companion import Companion, Connect, Step

# A step is a recorded operation of a session, such as a statement. After a successful step of one
# of these kinds, the session usually returns its connection to the pool.
ENDS = frozenset(("commit", "rollback"))


class Recording:
    """Records what one session did since the last commit or rollback of its unit of work.

    Attributes:
        steps: The recorded operations, for example statements and waits.
        waits_since: When the session began to wait for a connection. None if it is not waiting.
    """

    waits_since: float | None = None
    _asked: float = 0

    def __init__(self, companion: Companion) -> None:
        self.steps: list[Step] = []
        companion.recording = self
        companion.wrap_connect(self._connect)

    def _connect(self, connect: Connect, session: Any, engine: Engine) -> Connection:
        self.waits_since = since = perf_counter()
        try:
            connection = connect(session, engine)
        except BaseException:
            self._record_wait(since, perf_counter())
            raise
        finally:
            self.waits_since = None
        self._asked = since
        return connection

    def _record_wait(self, start: float, stop: float) -> None:
        if self.steps and self.steps[-1][0] == "wait":
            # The session has waited for a connection and got none. The last entry of `steps` says
            # that this has happened before. Add the time to this entry: a new entry for each
            # attempt could fill the memory.
            self.steps[-1][2] += stop - start
        else:
            self.steps.append(["wait", start, stop, None, ""])

    def connected(self, own: Any, connection: Any) -> None:
        """Record that the session got a connection, whose statements are recorded from now on.

        If `own` (the engine of the session) is not None, a connection of another engine is ignored.
        """
        if connection.engine is own or own is None or connection.engine.pool is own.engine.pool:
            steps = self.steps
            connection.asgi_dbsession_steps = connection.connection.asgi_dbsession_steps = steps
            now = perf_counter()
            steps.append(["hold", self._asked or now, now, None, ""])
            self._asked = 0

    def take(self, connections: tuple[Any, ...]) -> list[Step]:
        """Return what the session did until this commit or rollback, and begin a new list.

        If another task still uses one of `connections`, begin the new list with an entry `hold`
        (the session has a connection from this moment). Otherwise the next report would not count
        the time of this use.
        """
        done = self.steps
        if done:
            steps: list[Step] = []
            self.steps = steps
            for held in connections if done[-1][0] not in ENDS else ():
                if hasattr(held, "asgi_dbsession_steps"):
                    held.asgi_dbsession_steps = held.connection.asgi_dbsession_steps = steps
                    now = perf_counter()
                    steps[:] = [["hold", now, now, None, ""]]
        return done


def record(companion: Companion) -> None:
    """Start to record the statements of a session, and how long it waits for a connection.

    A second call for the same session does nothing.
    """
    if companion.recording is None:
        Recording(companion)
