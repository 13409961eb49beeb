"""The replicas of one database, and the choice of the server from which a client reads."""

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from time import monotonic
from typing import Any

from sqlalchemy import URL

from asgi_dbsession.database.engine_life import EngineLife
from asgi_dbsession.database.replicas import Replicas
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.unit.together import Run

from .checks import check_primary, check_replica, with_driver
from .choice import Choice
from .lag import Lag
from .position import Position, Seen
from .question import Answer
from .route import Route
from .seen_here import seen_here
from .server import Server, TaskServer
from .thread_server import ThreadServer
from .watch import Watch

# If no replica seems to have the changes that a client needs, ask the replicas again how far they
# have replayed the WAL, and let the client's request wait for the answers. Do not wait for a
# replica that has answered this question within this time (in seconds).
_AGAIN = 0.005
# Each server has one more connection, which only asks for the WAL position. For this connection,
# these engine options of the application are not used.
_POOL = (
    "pool",
    "poolclass",
    "pool_size",
    "max_overflow",
    "pool_timeout",
    "isolation_level",
    "echo",
)


class ReplicaSet:
    """The primary and all replicas of one database.

    Each replica gets a database object of the class `kind`, with the engine options of the primary.

    Raises:
        ConfigurationError: The driver is not for PostgreSQL, or an argument is wrong.
    """

    def __init__(
        self,
        database: EngineLife[Any],
        kind: type[Any],
        url: str | URL,
        given: Sequence[str | URL] | Replicas,
        options: dict[str, Any],
    ) -> None:
        self.options: Replicas = given if isinstance(given, Replicas) else Replicas(given)
        check_primary(database, options)
        self._kind = kind
        self._lag = Lag(self.options.max_lag)
        self._count = count(1)
        self.primary: Server = self._server(database, with_driver(url, database), options)
        self.replicas: list[Server] = []
        for each in self.options.urls:
            its_url = with_driver(each, database)
            replica = kind(its_url, ping_on_startup=False, **options)
            check_replica(replica, database, self.databases)
            server = self._server(replica, its_url, options)
            replica.observe(Watch(server))
            self.replicas.append(server)

    def _server(self, at: EngineLife[Any], url: str | URL, options: dict[str, Any]) -> Server:
        mine = {name: options[name] for name in options if name not in _POOL}
        mine |= {"pool_size": 1, "max_overflow": 0, "isolation_level": "AUTOCOMMIT"}
        asker = self._kind(url, ping_on_startup=False, **mine)
        return TaskServer(at, asker) if at.is_async else ThreadServer(at, asker)

    @property
    def databases(self) -> tuple[Any, ...]:
        """The `AsyncDatabase` or `SyncDatabase` objects of the replicas, each with its own pool."""
        return tuple(each.database for each in self.replicas)

    @property
    def position(self) -> str | None:
        """Up to which WAL position the current client has seen the database, as a string.

        None if the client has not used the database yet.
        """
        return seen_here(self).text

    async def startup(self, run: Run) -> None:
        """Build the engines of the replicas. Do not connect, because a replica may be down.

        Args:
            run: A function that calls blocking code: in a greenlet, in a thread, or directly.
        """
        for each in self._lives:
            await each._start(run)

    async def shutdown(self, run: Run) -> None:
        """Close all connections to the replicas, even if `startup` was called several times."""
        for server in self._servers:
            await server.stop(run)
        for each in self._lives:
            while each.is_running:
                await each._stop(run)

    def after_fork(self) -> None:
        """Called in a child process after a fork: forget the WAL positions reported by the servers.

        Also forget queries that are running in the parent. They never end in the child, because
        their threads and tasks do not run there. So the child asks the servers again.
        """
        for server in self._servers:
            server.forget()

    @property
    def _servers(self) -> tuple[Server, ...]:
        return (self.primary, *self.replicas)

    @property
    def _lives(self) -> tuple[Any, ...]:
        return (*self.databases, *(each.asker for each in self._servers))

    def give_route(self, made: ManagedSession[Any]) -> None:
        """Give a session a `Route`, the object that chooses the primary or a replica.

        A session that may write has the engine of the primary already. For such a session, the
        `Route` chooses nothing. It only records that the client uses the primary.
        """
        route = Route(self, seen_here(self), chooses=made.orm.bind is None)
        made.companion.route, made.companion.connect = route, route.connect

    def choose(self, seen: Seen) -> Choice | None:
        """Return the replica from which to read, or None for the primary."""
        chosen = self._choose(seen)
        if chosen is None:
            return None
        server, answer = chosen
        server.chosen = next(self._count)
        return Choice(server, answer, seen, self.options.lifetime)

    def ask_primary(self) -> Position | None:
        """Return the current WAL position of the primary, or None if it does not answer."""
        answer = self.primary.answer_since(monotonic())
        if answer is None:
            return None
        self._lag.record(answer)
        return answer.position

    def _choose(self, seen: Seen) -> tuple[Server, Answer] | None:
        """Return the least busy replica whose WAL position is high enough for this client.

        None if there is no such replica.
        """
        now = monotonic()
        needed = self._needed(seen, now)
        if needed is None:
            return None
        own = seen.replica
        allowed = [each for each in self.replicas if own is None or each.name in (None, own)]
        far_enough = _far_enough(allowed, needed, own, lambda each: each.current(now))
        if not far_enough:
            for each in allowed:
                # Ask all replicas before waiting for an answer, so that all of them answer at the
                # same time.
                each.ask()
            again = now - _AGAIN
            far_enough = _far_enough(allowed, needed, own, lambda each: each.answer_since(again))
        least_busy = sorted(far_enough, key=lambda each: (each[0].checked_out, each[0].chosen))
        return least_busy[0] if least_busy else None

    def _needed(self, seen: Seen, now: float) -> Position | None:
        """Return the WAL position that a replica must have reached, or None to use the primary."""
        if seen.users:
            # A session of this client is using the primary now, and may have committed there. So
            # the client may have seen everything up to the current WAL position of the primary.
            seen.read_from_primary(self.ask_primary())
        answer = self.primary.current(now)
        if answer is not None:
            self._lag.record(answer)
        floor = self._lag.floor(now)
        if floor is None or not seen.is_trusted:
            return None
        if seen.position is None or floor.includes(seen.position):
            return floor
        return seen.position if seen.position.includes(floor) else None


def _far_enough(
    servers: Iterable[Server],
    needed: Position,
    own: str | None,
    ask: Callable[[Server], Answer | None],
) -> list[tuple[Server, Answer]]:
    answers = [(each, ask(each)) for each in servers]
    return [
        (server, answer)
        for server, answer in answers
        if answer is not None
        and answer.is_standby
        and own in (None, answer.name)
        and answer.position.includes(needed)
    ]
