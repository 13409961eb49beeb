"""Prevents a child process from using the database connections of its parent process."""

import os
from typing import Any
from weakref import WeakSet

from sqlalchemy import Pool

from asgi_dbsession.unit.current import current_unit

# In a child process, this list has the pools of the parent process. If Python freed these pools, it
# would close connections that the parent process still uses.
inherited_pools: list[Pool] = []

# In each child process, the method `after_fork` of these database objects is called before other
# code runs there.
# Source: https://docs.sqlalchemy.org/en/20/core/pooling.html#pooling-multiprocessing
databases: WeakSet[Any] = WeakSet()


def _after_fork() -> None:
    # Forget the current unit of work, because its sessions use connections of the parent process.
    current_unit.set(None)
    for each in tuple(databases):
        each.after_fork()


# Windows has no `fork`, so Python has no `os.register_at_fork` there.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
