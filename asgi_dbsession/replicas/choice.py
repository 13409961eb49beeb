"""The replica that was chosen for a unit of work, and how to connect to this replica."""

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import TimeoutError as PoolTimeout

from .position import Seen
from .question import Answer
from .server import Server
from .watch import OPENED


class Choice:
    """A replica that was chosen for a unit of work, because it has all that the client has seen.

    Args:
        server: The replica.
        answer: The last answer of the replica, with its WAL position (how much it has replayed).
        seen: What the client has seen. Each read from the replica is recorded there.
        lifetime: For how many seconds the client stores what it has seen.
    """

    def __init__(self, server: Server, answer: Answer, seen: Seen, lifetime: float) -> None:
        self.engine: Engine = server.engine
        self._server = server
        self._answer = answer
        self._seen = seen
        self._lifetime = lifetime

    def record_read(self) -> None:
        """Record that the client has seen data of this replica."""
        self._seen.read_from_replica(self._answer.name, self._answer.position, self._lifetime)

    def connect(self) -> Connection | None:
        """Return a connection to the replica, or None if it is down or has just restarted.

        Raises:
            sqlalchemy.exc.TimeoutError: No connection became free within the `pool_timeout`.
        """
        # Import before the connection: if too many files are open, both would fail.
        from asgi_dbsession.database.optional.failures.explanation import keeps_from_connecting

        try:
            connection = self.engine.connect()
        except PoolTimeout:
            raise
        # While some drivers connect, they raise errors that SQLAlchemy does not wrap, for example
        # `ConnectionRefusedError`.
        except Exception as error:
            if not keeps_from_connecting(error):
                raise  # A listener of the application may have raised this error.
            self._server.lost()
            return None
        is_same = False
        try:
            is_same = self._is_same(connection)
        finally:
            if not is_same:
                connection.close()
        return connection if is_same else None

    def _is_same(self, connection: Connection) -> bool:
        """Return False if the replica may have restarted since it reported its WAL position.

        After a restart, a replica may accept readers before it has replayed all WAL that it had
        replayed before. A restart closes all connections. So if the connection was open before the
        last answer of the replica, there was no restart since. Otherwise ask the replica again.
        """
        opened = connection.info[OPENED]
        if opened <= self._answer.asked:
            return True
        later = self._server.answer_since(opened)
        return later is not None and later.is_standby and later.name == self._answer.name
