"""Which server one session talks to."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from asgi_dbsession.session.guard import derive

from .position import Position, Seen

S = TypeVar("S", bound=Session)


class Servers(Protocol):
    """What a session needs of a `ReplicaSet`."""

    def choose(self, seen: Seen) -> tuple[Engine, Callable[[], None] | None]:
        """Return an engine to read from, and what to call before each read on a replica."""
        ...

    def ask_primary(self) -> Position | None:
        """Where the primary is now; None if it does not answer."""


class Route:
    """The route of one session: a replica for a unit of work that may only read, or the primary.

    Args:
        servers: The servers to choose from.
        seen: What the client has seen.
        chooses: False if the session has the engine of the primary already.
    """

    def __init__(self, servers: Servers, seen: Seen, *, chooses: bool) -> None:
        self._servers = servers
        self._seen = seen
        self._chooses = chooses
        self._read_from_replica: Callable[[], None] | None = None
        self._has_ended = False

    def choose(self, session: Session) -> None:
        """Choose a server at the first statement of the work, and keep to it."""
        if self._chooses and (session.bind is None or self._has_ended):
            self._has_ended = False
            session.bind, self._read_from_replica = self._servers.choose(self._seen)
        if self._read_from_replica is not None:
            self._read_from_replica()
        else:
            self._seen.users.add(self)

    def work_ended(self) -> bool:
        """Record that the work was committed or rolled back; return True to have `learn` called."""
        self._has_ended = True
        return self in self._seen.users

    def learn(self) -> None:
        """Learn what the client has seen on the primary."""
        self._seen.users.discard(self)  # first: another thread may begin now
        self._seen.read_from_primary(self._servers.ask_primary())


def routed_class(guarded: type[S]) -> type[S]:
    """Derive a class that has the route of the session choose the engine."""
    return derive(guarded, (guarded,), {"get_bind": _routing(guarded.get_bind)})


def _routing(get_bind: Callable[..., Any]) -> Callable[..., Any]:
    def get_bind_of_route(self: Any, *args: Any, **kwargs: Any) -> Any:
        route: Route | None = self._companion.route
        if route is not None:
            route.choose(self)
        return get_bind(self, *args, **kwargs)

    return get_bind_of_route
