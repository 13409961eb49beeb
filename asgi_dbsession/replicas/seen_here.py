"""Stores, for each database with replicas, the last WAL position that the client has seen."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from asgi_dbsession.errors import ConfigurationError, kind_of

from .position import Seen

# For each database with replicas (`ReplicaSet`), the WAL position up to which the current client
# has seen the database. Each request sets its own dictionary.
_here: ContextVar[dict[Any, Seen] | None] = ContextVar("asgi_dbsession.seen", default=None)


@contextmanager
def used_here(seen: dict[Any, Seen]) -> Iterator[None]:
    """In the `with` block, use `seen` for the current client (of a request, for example).

    Args:
        seen: For each database with replicas (`ReplicaSet`), the WAL position up to which the
            client has seen the database. Code in the block uses this position to choose a replica,
            and updates it.
    """
    token = _here.set(seen)
    try:
        yield
    finally:
        _here.reset(token)


def seen_here(replica_set: Any) -> Seen:
    """Return the object with the WAL position up to which the current client has seen a database.

    Args:
        replica_set: The replicas of this database.
    """
    found = _here.get()
    if found is None:
        found = {}
        _here.set(found)
    return found.setdefault(replica_set, Seen())


def see(replica_set: Any, position: str, *, join: bool, read_only: bool) -> None:
    """For `begin(after=position)`: record that the client has seen all changes up to `position`.

    The `begin()` block then reads only from servers that have all these changes.

    Raises:
        ConfigurationError: `position` is not a string, or the block may write, or it uses the
            session of the request or block around it (`join=True`).
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
