"""Tools for tests of an application: roll back all work after each test, count statements."""

from .isolation import NotIsolated
from .rollback import rolled_back
from .statements import count_statements

__all__ = ["NotIsolated", "count_statements", "rolled_back"]
