"""What the tests of an application need: a database that forgets, and a count of statements."""

from .connection import NotIsolated
from .rollback import rolled_back
from .statements import count_statements

__all__ = ["NotIsolated", "count_statements", "rolled_back"]
