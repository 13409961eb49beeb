"""Records the steps of a session: waits for a connection, statements, COMMITs and ROLLBACKs."""

from time import perf_counter
from typing import Any

from sqlalchemy import Connection, Engine

from asgi_dbsession.session.companion import Companion, Connect, Step

# A step is a recorded operation of a session, such as a statement. After a successful step of one
# of these kinds, the session usually returns its connection to the pool.
ENDS = frozenset(("commit", "rollback"))


class Recording:
    """Records what one session did since the last commit or rollback of its unit of work.

    Args:
        companion: The object with the data that this package attaches to the session.

    Attributes:
        steps: What the session did: a list of steps (statements and waits, for example).
        waits_since: When the session began to wait for a connection. None if it is not waiting now.
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
            # The last entry of the list is a wait too, in which the session got no connection. Add
            # up both waits in this entry. Otherwise a session that waits again and again would make
            # the list very long.
            self.steps[-1][2] += stop - start
        else:
            self.steps.append(["wait", start, stop, None, ""])

    def connected(self, own: Any, connection: Any) -> None:
        """Record that the session got a connection, and has begun a transaction on it.

        Args:
            own: The engine of the session. Only connections of its pool are recorded. None to
                record the connections of all engines.
            connection: The SQLAlchemy connection. This object and the pool's connection inside it
                get the attribute `asgi_dbsession_steps`, which is the list of the session's steps.
        """
        if connection.engine is own or own is None or connection.engine.pool is own.engine.pool:
            steps = self.steps
            connection.asgi_dbsession_steps = connection.connection.asgi_dbsession_steps = steps
            now = perf_counter()
            steps.append(["hold", self._asked or now, now, None, ""])
            self._asked = 0

    def take(self, connections: tuple[Any, ...]) -> list[Step]:
        """Return the steps, and begin a new list, after a commit or rollback of the unit of work.

        Args:
            connections: The open connections of the session. If another task is still using one of
                them, the new list begins with a step of the kind `hold`. So the report of the next
                commit or rollback has the time in which the connection is held.
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
    """Record the steps of a session from now on. Do nothing if they are recorded already."""
    if companion.recording is None:
        Recording(companion)
