"""Notes the times at which a session asks for a connection and gets it, for reports."""

import functools
from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from .companion import Companion, Step
from .guard import derive

S = TypeVar("S", bound=Session)

# After a COMMIT or ROLLBACK, the connection is in its pool again.
ENDS = frozenset(("commit", "rollback"))

# The open units of work that have opened a session, if reports or the live page observe them.
observed: set[Any] = set()


def recording_class(guarded: type[S]) -> type[S]:
    """Derive a session class that records when the session asks for an engine."""
    # Replace the method `connection` too: if it gets an engine as an argument, it does not call
    # `get_bind`.
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
        companion: The data that this package attaches to the session.
        own: The engine of the session. Connections of other engines are ignored.
        connection: The SQLAlchemy connection. It and the pool's connection inside it get the
            attribute `asgi_dbsession_steps`, which is the list of the session's steps.
    """
    if connection.engine is own or own is None or connection.engine.pool is own.engine.pool:
        steps = companion.steps
        connection.asgi_dbsession_steps = connection.connection.asgi_dbsession_steps = steps
        steps.append(["hold", companion.asked, perf_counter(), None, ""])
        companion.unit.has_news = True


def begin_steps(companion: Companion) -> list[Step]:
    """Return a new list for the steps of a session, after a commit or rollback of its unit of work.

    If the session has a connection again, because another task uses the session, the list begins
    with a step for this connection.
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
