"""Stores, for the running code, what its client has seen of each database with replicas."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .position import Seen

# What the client has seen, for each replica set. Each request sets a value of its own; a worker
# without a request gets a value at its first unit of work.
_here: ContextVar[dict[Any, Seen] | None] = ContextVar("asgi_dbsession.seen", default=None)


@contextmanager
def used_here(seen: dict[Any, Seen]) -> Iterator[None]:
    """Let the code inside the block work for a client that has seen `seen`."""
    token = _here.set(seen)
    try:
        yield
    finally:
        _here.reset(token)


def seen_here(servers: Any) -> Seen:
    """Return what the client of this context has seen of the database with these replicas."""
    found = _here.get()
    if found is None:
        found = {}
        _here.set(found)
    return found.setdefault(servers, Seen())
