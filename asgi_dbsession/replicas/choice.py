"""The replica that was chosen for a session, and how to connect to this replica."""

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import TimeoutError as PoolTimeout

from .position import Seen
from .question import Answer
from .server import Server
from .watch import OPENED


class Choice:
    """The replica for a session's next statements, with all changes that the client has seen.

    Args:
        answer: The replica's last answer, with the WAL position that it has replayed.
        seen: Up to which WAL position the client has seen the database.
        lifetime: For how many seconds `seen` is stored for the client.
    """

    def __init__(self, server: Server, answer: Answer, seen: Seen, lifetime: float) -> None:
        self.engine: Engine = server.engine
        self._server = server
        self._answer = answer
        self._seen = seen
        self._lifetime = lifetime

    def record_read(self) -> None:
        """Record that the client has read from this replica."""
        self._seen.read_from_replica(self._answer.name, self._answer.position, self._lifetime)

    def connect(self) -> Connection | None:
        """Return a connection to the replica, or None if the session must use the primary instead.

        None if the replica is down. Also None if the replica may have restarted since it reported
        its WAL position, because a restarted replica may show older data.

        Raises:
            sqlalchemy.exc.TimeoutError: No connection became free within the `pool_timeout`.
        """
        # The `except` block below needs this function. Import the function before connecting: if
        # the process has too many open files, connecting fails, and then an import would fail too.
        from asgi_dbsession.database.optional.failures.explanation import keeps_from_connecting

        try:
            connection = self.engine.connect()
        except PoolTimeout:
            raise
        # Catch all errors: while connecting, some drivers raise errors that SQLAlchemy does not
        # wrap, for example `ConnectionRefusedError`.
        except Exception as error:
            # The error may be from an event listener of the application. Then the replica is not
            # down, so raise the error.
            if not keeps_from_connecting(error):
                raise
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
        """Return True if the replica has not restarted since it reported its WAL position.

        A restart closes all connections. So if `connection` was opened before the report, return
        True. If it was opened later, ask the replica again, and compare `Answer.name`: a checksum
        that contains the time of the replica's last start.
        """
        opened = connection.info[OPENED]
        if opened <= self._answer.asked:
            return True
        later = self._server.answer_since(opened)
        return later is not None and later.is_standby and later.name == self._answer.name
