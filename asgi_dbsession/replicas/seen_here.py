"""Stores what the client of the current request has seen of each database with replicas."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from asgi_dbsession.errors import ConfigurationError, kind_of

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


def seen_here(replica_set: Any) -> Seen:
    """Return what the current client has seen of the database with these replicas."""
    found = _here.get()
    if found is None:
        found = {}
        _here.set(found)
    return found.setdefault(replica_set, Seen())


def see(replica_set: Any, position: str, *, join: bool, read_only: bool) -> None:
    """Let the current client read only from servers that have reached `position`.

    Args:
        replica_set: The `ReplicaSet` of the database, or None if the database has no replicas.
        position: The value of the option `after` of `begin()`.
        join: The option `join` of `begin()`.
        read_only: The option `read_only` of `begin()`.

    Raises:
        ConfigurationError: The block joins another unit of work, or may write. Or `position` is not
            a text.
    """
    if not isinstance(position, str):
        raise ConfigurationError(
            f"`after` takes a value of the property `position`, not {kind_of(position)}."
        )
    if join or not read_only:
        raise ConfigurationError(
            "`after` is for a unit of work of its own that may only read. Write "
            "`begin(read_only=True, after=position)`; all other work uses the primary."
        )
    if replica_set is not None:
        seen_here(replica_set).add(position)
