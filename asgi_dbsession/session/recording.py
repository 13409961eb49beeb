"""Records how a session waits for a connection, holds it and gives it back; for reports."""

import functools
from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from .companion import Companion, Step
from .guard import derive

S = TypeVar("S", bound=Session)

# After a step of these kinds, the connection is back in its pool.
ENDS = frozenset(("commit", "rollback"))

# The units of work with observers that have opened a session and have not ended.
observed: set[Any] = set()


def recording_class(guarded: type[S]) -> type[S]:
    """Derive a session class that records when it asks for an engine, and so for a connection."""
    # `connection` may get the engine as an argument, and then does not call `get_bind`.
    methods = {name: _recording(getattr(guarded, name)) for name in ("get_bind", "connection")}
    return derive(guarded, (guarded,), methods)


def _recording(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._companion.asked = perf_counter()
        return method(self, *args, **kwargs)

    return ask


def record_checkout(companion: Companion, own: Any, connection: Any) -> None:
    """Record that a session got a connection.

    Args:
        companion: The data of the session.
        own: The engine of the session; the connections of all other engines are ignored.
        connection: SQLAlchemy's `Connection`. It and the connection of the pool below it get the
            attribute `asgi_dbsession_steps`, the list of the steps of the session.
    """
    if connection.engine is own or own is None or connection.engine.pool is own.engine.pool:
        steps = companion.steps
        connection.asgi_dbsession_steps = connection.connection.asgi_dbsession_steps = steps
        steps.append(["hold", companion.asked, perf_counter(), None, ""])
        companion.unit.has_news = True


def begin_steps(companion: Companion) -> list[Step]:
    """Return a new list for the steps of a session after a commit or rollback of its unit of work.

    Another task of the unit may still use the session. Then the list begins with its connection.
    """
    steps: list[Step] = []
    for each in companion.open_connections:
        held: Any = each
        if hasattr(held, "asgi_dbsession_steps"):
            held.asgi_dbsession_steps = held.connection.asgi_dbsession_steps = steps
            now = perf_counter()
            steps[:] = [["hold", now, now, None, ""]]
            companion.unit.has_news = True
    return steps
