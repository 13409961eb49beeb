"""What the client that this code works for has seen."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .position import Seen

# Of each database with replicas. A request has its own; a worker begins one with its first unit.
_here: ContextVar[dict[Any, Seen] | None] = ContextVar("asgi_dbsession.seen", default=None)


@contextmanager
def used_here(seen: dict[Any, Seen]) -> Iterator[None]:
    """Have the code of the block work for a client that has seen this."""
    token = _here.set(seen)
    try:
        yield
    finally:
        _here.reset(token)


def seen_here(servers: Any) -> Seen:
    """What the client of this context has seen of a database, by its `ReplicaSet`."""
    found = _here.get()
    if found is None:
        found = {}
        _here.set(found)
    return found.setdefault(servers, Seen())
