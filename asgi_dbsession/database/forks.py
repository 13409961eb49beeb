"""Prevents a child process from using the database connections of its parent process."""

import os
from typing import Protocol
from weakref import WeakSet

from sqlalchemy import Pool

from asgi_dbsession.unit.unit_of_work import current_unit


class Forked(Protocol):
    """An object with connections that a child process must not use after a fork."""

    def after_fork(self) -> None:
        """Called in the child process: stop using the connections of the parent process."""
        ...


# In a child process, this list has the pools of the parent process. If Python freed these pools, it
# would close connections that the parent process still uses.
inherited_pools: list[Pool] = []

_databases: WeakSet[Forked] = WeakSet()


def notice_forks(database: Forked) -> None:
    """Call `database.after_fork` in each child process, before other code runs there.

    Source: https://docs.sqlalchemy.org/en/20/core/pooling.html#pooling-multiprocessing
    """
    _databases.add(database)


def _after_fork() -> None:
    # Forget the current unit of work, because its sessions use connections of the parent process.
    current_unit.set(None)
    for database in tuple(_databases):
        database.after_fork()


# Windows has no `fork`, so Python has no `os.register_at_fork` there.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
