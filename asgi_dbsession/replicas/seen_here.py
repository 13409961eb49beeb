"""Stores what the client of the current request has seen of each database with replicas."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .position import Seen

# For each replica set, what the client of this context has seen. Each request sets its own
# dictionary. A worker without a request gets a dictionary at its first unit of work.
_here: ContextVar[dict[Any, Seen] | None] = ContextVar("asgi_dbsession.seen", default=None)


@contextmanager
def used_here(seen: dict[Any, Seen]) -> Iterator[None]:
    """Inside the `with` block, use `seen` as what the client of this context has seen."""
    token = _here.set(seen)
    try:
        yield
    finally:
        _here.reset(token)


def seen_here(servers: Any) -> Seen:
    """Return what the client of this context has seen of the replica set `servers`."""
    found = _here.get()
    if found is None:
        found = {}
        _here.set(found)
    return found.setdefault(servers, Seen())
