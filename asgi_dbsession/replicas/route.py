"""Chooses whether a session uses the primary or a replica."""

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from asgi_dbsession.session.guard import derive
from asgi_dbsession.session.reads import isolation_level

from .choice import Choice
from .position import Seen

S = TypeVar("S", bound=Session)


class Route:
    """Chooses the server of one session: the primary, or a replica if the session may only read.

    If `chooses` is False, the session may write, so only record that the client uses the primary.
    """

    def __init__(self, replica_set: Any, seen: Seen, *, chooses: bool) -> None:
        self._replica_set = replica_set
        self._seen = seen
        self._chooses = chooses
        # The chosen replica, or None if the session uses the primary.
        self._choice: Choice | None = None
        self._has_ended = False

    def choose(self, session: Session) -> None:
        """Choose the server of a session. Called before each statement.

        The session keeps its server until a commit or rollback. There is one exception: if other
        code of the same request uses the primary meanwhile (in a `begin()` block, for example), the
        server is chosen again, so that the session sees these writes. At REPEATABLE READ and above,
        the server is kept, because all statements of a transaction must see the same data.
        """
        is_new = session.bind is None or self._has_ended
        if self._chooses and (is_new or self._is_outdated(session)):
            self._has_ended = False
            self._choice = choice = self._replica_set.choose(self._seen)
            session.bind = self._replica_set.primary.engine if choice is None else choice.engine
        if self._choice is not None:
            self._choice.record_read()
        else:
            self._seen.users.add(self)

    def connect(self, session: Session, engine: Engine) -> Connection:
        """Connect to the chosen replica, or to the primary if no replica was chosen or it is down.

        If the session uses a further engine (SQLAlchemy's option `binds`), connect to that engine.
        """
        if engine is not session.bind:
            return engine.connect()
        if self._choice is not None:
            connection = self._choice.connect()
            if connection is not None:
                return connection
            # The chosen replica is down or has restarted, so use the primary. Do not use another
            # replica: the client may have read from the chosen one, and another one may have
            # replayed less.
            self._choice = None
            session.bind = engine = self._replica_set.primary.engine
            self._seen.users.add(self)
        return engine.connect()

    def _is_outdated(self, session: Session) -> bool:
        if self._choice is None or self._seen.replica is not None:
            return False
        guarded: Any = session
        # Above READ COMMITTED, all statements of a transaction must see the same data. So the
        # session must not change to another server during a transaction.
        return all(
            isolation_level(each) in ("READ COMMITTED", "AUTOCOMMIT")
            for each in guarded._companion.open_connections
        )

    def work_ended(self) -> bool:
        """Called after a commit or rollback. Return True if the session has used the primary.

        Then the caller must call `learn`: the client has seen the newest changes, so the WAL
        position of the primary must be recorded.
        """
        self._has_ended = True
        return self in self._seen.users

    def learn(self) -> None:
        """Ask the primary for its WAL position, and record that the client has seen it.

        From now on, the client must not read older data.
        """
        # Remove this session from `users` (the sessions that use the primary now), and only then
        # ask the primary for its WAL position. While the primary answers, another thread may begin
        # new work in this session, and add it to `users` again. This entry must not be removed.
        self._seen.users.discard(self)
        self._seen.read_from_primary(self._replica_set.ask_primary())


def routed_class(guarded: type[S]) -> type[S]:
    """Derive a session class that chooses the server (`Route.choose`) before each statement."""
    return derive(guarded, (guarded,), {"get_bind": _routing(guarded.get_bind)})


def _routing(get_bind: Callable[..., Any]) -> Callable[..., Any]:
    def get_bind_of_route(self: Any, *args: Any, **kwargs: Any) -> Any:
        route: Route | None = self._companion.route
        if route is not None:
            route.choose(self)
        return get_bind(self, *args, **kwargs)

    return get_bind_of_route
