"""A session class whose every operation takes its turn."""

import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, SessionTransaction
from typing_extensions import override

from asgi_dbsession.errors import PrematureClose
from asgi_dbsession.retry.overload import note_wait_in_vain

from .lock import Turn

R = TypeVar("R")
S = TypeVar("S", bound=Session)

# Whatever may talk to the database; some names are younger than the oldest SQLAlchemy we support.
_OPERATIONS = (
    "bulk_insert_mappings",
    "bulk_save_objects",
    "bulk_update_mappings",
    "commit",
    "connection",
    "delete",
    "delete_all",
    "execute",
    "flush",
    "get",
    "get_one",
    "invalidate",
    "merge",
    "merge_all",
    "prepare",
    "refresh",
    "rollback",
    "scalar",
    "scalars",
)


def in_turn(session_class: type[S]) -> type[S]:
    """Derive a class from `session_class` whose operations take turns; see `put_in_turn`.

    The guard sits on the plain `Session`, below an `AsyncSession`, so that it also covers lazy
    loading, `run_sync` and whatever methods a class of the user's adds.
    """
    bases = (SessionInTurn,) if session_class is Session else (session_class, SessionInTurn)
    return types.new_class(
        session_class.__name__,
        bases,
        exec_body=lambda namespace: namespace.update(__module__=session_class.__module__),
    )


def put_in_turn(session: Session, turn: Turn) -> Turn:
    """Have the operations of a session made by such a class take this turn.

    Not an argument of its constructor, which is in the way of every request.
    """
    vars(session)["_turn"] = turn
    return turn


def _taking_turn(operation: Callable[..., R]) -> Callable[..., R]:
    @functools.wraps(operation)
    def take_turn(self: Any, *args: Any, **kwargs: Any) -> R:
        turn: Turn = self._turn
        is_outermost = turn.take()
        try:
            return operation(self, *args, **kwargs)
        except PoolTimeout:
            note_wait_in_vain()
            raise
        finally:
            if is_outermost:
                turn.give()

    return take_turn


class SessionInTurn(Session):
    """What `in_turn` derives from; an application sees the session class that it asked for."""

    _turn: Turn
    _connections: tuple[Connection, ...] = ()  # see `transaction.py`

    @override
    def add(self, instance: object, *args: Any, **kwargs: Any) -> None:
        self._turn.touch()
        super().add(instance, *args, **kwargs)

    @override
    @_taking_turn
    def begin(self, nested: bool = False) -> SessionTransaction:
        transaction = super().begin(nested)
        # SQLAlchemy has no factory for these, and RELEASE SAVEPOINT must not overlap an end either.
        transaction.__class__ = _TransactionInTurn
        return transaction

    @override
    def _autoflush(self) -> None:
        # It precedes every statement, inside of whose turn it is: no need to ask for that again.
        if not self._is_clean():
            super()._autoflush()

    @override
    def close(self) -> None:
        if self._turn.is_ended_here():
            super().close()
        else:
            self.reset()

    @override
    @_taking_turn
    def reset(self) -> None:
        if self.in_transaction():
            # As at the end of `async with get_session()`: what was done would be lost, and
            # a success sent all the same.
            raise PrematureClose(self._turn.database)
        super().reset()


class _TransactionInTurn(SessionTransaction):
    @property
    def _turn(self) -> Turn:
        session: Any = self.session
        turn: Turn = session._turn
        return turn


for _name in _OPERATIONS:
    if hasattr(Session, _name):
        setattr(SessionInTurn, _name, _taking_turn(getattr(Session, _name)))
for _name in ("close", "commit", "prepare", "rollback"):
    setattr(_TransactionInTurn, _name, _taking_turn(getattr(SessionTransaction, _name)))
