"""A transaction of the application, which is only a savepoint in a test."""

import asyncio
import re
from threading import get_ident

from asgi_dbsession.session.tasks import current_task
from asgi_dbsession.unit.current import current_unit
from asgi_dbsession.unit.unit_of_work import UnitOfWork

# The first word of a statement, after comments and brackets.
_FIRST_WORD = re.compile(r"(?:[\s(]|--[^\n]*|/\*.*?\*/)*(\w*)", re.DOTALL)
_WORD = re.compile(r"\w+")
_READS = frozenset(("SELECT", "SHOW", "TABLE", "VALUES"))
# These statements store nothing, but their effect lasts until the end of the transaction.
_LASTING = frozenset(("RELEASE", "RESET", "ROLLBACK", "SAVEPOINT", "SET"))
# A statement that begins with WITH can write only if it contains one of these words.
_WRITES = frozenset(("DELETE", "INSERT", "MERGE", "REPLACE", "UPDATE"))


def current_caller() -> object:
    """Return the running task. Outside of tasks, return the number of the thread."""
    return current_task() or get_ident()


class SavepointTransaction:
    """A transaction of the application, which is only a savepoint in a test.

    Args:
        number: A number for the name of the savepoint.
        test: The task or thread of the test.

    Attributes:
        unit: The unit of work of the transaction. None for `Session(engine)`, for example.
        caller: The task or the thread that began the transaction.
        saved: True if the savepoint exists on the server.
        wrote: True if the transaction has sent a statement that may write.
        acted: The same, or True if it has sent a statement such as SAVEPOINT or SET LOCAL.
        keeps: True if another transaction inside this savepoint has committed writes.
        read_only: True if PostgreSQL was told to refuse writes in this savepoint.
        aborted: True if only a rollback is possible now.
    """

    caller: object = None
    saved: bool = False
    wrote: bool = False
    acted: bool = False
    keeps: bool = False
    aborted: bool = False
    read_only: bool = False

    def __init__(self, number: int, test: object) -> None:
        self.name: str = f"asgi_dbsession_{number}"
        self.unit: UnitOfWork | None = current_unit.get()
        self._test = test

    def __str__(self) -> str:
        if self.unit is None:
            return "a transaction that was opened on the engine itself"
        if self.unit.scope is None:
            return "a transaction outside of any request"
        scope = self.unit.scope
        # A client can put line breaks into the path. `repr` escapes them.
        path = repr(scope.get("path", ""))[1:-1]
        return f"the transaction of {scope.get('method', scope['type'])} {path}"

    @property
    def is_of_request(self) -> bool:
        """True if the transaction began during a request."""
        return self.unit is not None and self.unit.scope is not None

    @property
    def is_of_engine(self) -> bool:
        """True if the transaction began outside of any request or `begin()` block.

        For example, the test itself has opened a `Session(engine)`.
        """
        return self.unit is None

    @property
    def is_of_test(self) -> bool:
        """True if the test itself began the transaction, and not the application in a request."""
        return not self.is_of_request and self.caller == self._test and not _is_done(self._test)

    def record(self, statement: str) -> None:
        """Set `wrote` and `acted`. A SELECT counts as a read, even if it calls a function."""
        found = _FIRST_WORD.match(statement)
        word = found[1].upper() if found else ""
        if word == "WITH":
            is_read = _WRITES.isdisjoint(_WORD.findall(statement.upper()))
        else:
            is_read = word in _READS
        self.acted = self.acted or not is_read
        self.wrote = self.wrote or not (is_read or word in _LASTING)

    def may_begin_inside(self, other: "SavepointTransaction") -> bool:
        """Return True if this transaction must begin inside of the open transaction `other`.

        If this transaction waited for the end of `other` instead, the two could wait for each other
        (a deadlock).
        """
        if self.unit is not None and any(each is other.unit for each in self.unit.chain()):
            return True
        if other.is_of_request:
            return False
        return self.is_of_request or other.is_of_test or self.caller == other.caller


def _is_done(caller: object) -> bool:
    return isinstance(caller, asyncio.Future) and caller.done()
