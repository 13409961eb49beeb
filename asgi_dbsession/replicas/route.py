"""Chooses the server of a session: the primary or a replica."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from asgi_dbsession.session.guard import derive
from asgi_dbsession.session.reads import isolation_level

from .choice import Choice
from .position import Position, Seen
from .server import Server

S = TypeVar("S", bound=Session)


class Servers(Protocol):
    """The parts of a `ReplicaSet` that a `Route` uses."""

    primary: Server

    def choose(self, seen: Seen) -> Choice | None:
        """Return the replica to read from; None to read from the primary."""
        ...

    def ask_primary(self) -> Position | None:
        """Return the present WAL position of the primary; None if the primary does not answer."""


class Route:
    """Chooses the server of one session: for a read-only unit of work, it may be a replica.

    Args:
        servers: The servers to choose from.
        seen: What the client of the session has seen.
        chooses: False if the session always uses the primary, because its unit of work may write.
    """

    def __init__(self, servers: Servers, seen: Seen, *, chooses: bool) -> None:
        self._servers = servers
        self._seen = seen
        self._chooses = chooses
        self._choice: Choice | None = None  # None while the session uses the primary
        self._has_ended = False

    def choose(self, session: Session) -> None:
        """Choose a server at the first statement of a unit of work, for all its statements.

        After the choice of a replica, the same client may use the primary, for example to write in
        `begin()`. Then choose again, so that the next statement sees what was written.
        """
        is_new = session.bind is None or self._has_ended
        if self._chooses and (is_new or self._is_outdated(session)):
            self._has_ended = False
            self._choice = choice = self._servers.choose(self._seen)
            session.bind = self._servers.primary.engine if choice is None else choice.engine
        if self._choice is not None:
            self._choice.record_read()
        else:
            self._seen.users.add(self)

    def connect(self, session: Session) -> Connection:
        """Connect to the chosen server, or to the primary if the chosen replica cannot be used."""
        if self._choice is not None:
            connection = self._choice.connect()
            if connection is not None:
                return connection
            # Use the primary, and no other replica: this client may have read from the lost
            # replica, and any other replica may have replayed less.
            self._choice, session.bind = None, self._servers.primary.engine
            self._seen.users.add(self)
        engine: Any = session.bind
        connection_to_primary: Connection = engine.connect()
        return connection_to_primary

    def _is_outdated(self, session: Session) -> bool:
        if self._choice is None or self._seen.replica is not None:
            return False
        guarded: Any = session
        # At any other isolation level, all statements must read the same state, so do not change
        # the server.
        return all(
            isolation_level(each) in ("READ COMMITTED", "AUTOCOMMIT")
            for each in guarded._companion.open_connections
        )

    def work_ended(self) -> bool:
        """Record a commit or rollback; return True if the caller must call `learn`."""
        self._has_ended = True
        return self in self._seen.users

    def learn(self) -> None:
        """Ask the primary for its WAL position; the client must not read an older state later."""
        # Remove this object from `users` before the query. During the query, another thread may
        # begin new work and add this object again.
        self._seen.users.discard(self)
        self._seen.read_from_primary(self._servers.ask_primary())


def routed_class(guarded: type[S]) -> type[S]:
    """Derive a session class that calls `Route.choose` before each statement."""
    return derive(guarded, (guarded,), {"get_bind": _routing(guarded.get_bind)})


def _routing(get_bind: Callable[..., Any]) -> Callable[..., Any]:
    def get_bind_of_route(self: Any, *args: Any, **kwargs: Any) -> Any:
        route: Route | None = self._companion.route
        if route is not None:
            route.choose(self)
        return get_bind(self, *args, **kwargs)

    return get_bind_of_route
