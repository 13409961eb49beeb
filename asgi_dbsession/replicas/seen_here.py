"""Stores what the client of the current request has seen of each database with replicas."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .position import Seen

# What the current client has seen, for each `ReplicaSet`. Each request sets a dictionary of its
# own. A worker has no request, and gets a dictionary at its first unit of work.
_here: ContextVar[dict[Any, Seen] | None] = ContextVar("asgi_dbsession.seen", default=None)


@contextmanager
def used_here(seen: dict[Any, Seen]) -> Iterator[None]:
    """Use `seen` in the `with` block: which state of each database the client has read already."""
    token = _here.set(seen)
    try:
        yield
    finally:
        _here.reset(token)


def seen_here(servers: Any) -> Seen:
    """Return what the current client has seen of the database with the replicas `servers`."""
    found = _here.get()
    if found is None:
        found = {}
        _here.set(found)
    return found.setdefault(servers, Seen())
