"""A session that a unit of work opened, and how several of them end together."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from sqlalchemy.orm import Session

from asgi_dbsession.session.commit import begin_end, end
from asgi_dbsession.session.lock import Turn, is_done
from asgi_dbsession.session.two_phases import note_decision, note_doubt, prepared
from asgi_dbsession.types import Scope

S = TypeVar("S")


@dataclass(slots=True, eq=False)
class OpenSession(Generic[S]):
    """A session that a unit of work opened.

    Args:
        session: What the application works with.
        orm: The `sqlalchemy.orm.Session` behind it; `session` itself, where that is one.
        turn: The turn on it.
        run: Calls a plain function where it may block. The one seam of async and sync.
        opener: The task that opened it, where it is worked on by threads, which have none.
    """

    session: S
    orm: Session
    turn: Turn
    run: Callable[..., Awaitable[None]]
    opener: object = None

    def is_work_of(self, tasks: tuple[object, ...]) -> bool:
        """Whether all that was done here since the last end is done, and by these tasks.

        None among them is a task that nobody knows, or that has ended by now. A blocking session is
        worked on by threads, which say nothing of tasks: there, whether one of them opened it.
        """
        if self.turn.is_busy:
            return False
        workers = {self.opener} if self.session is self.orm else self.turn.workers or {None}
        return all(each in tasks or (None in tasks and is_done(each)) for each in workers)


class SessionSource(Protocol[S]):
    """What a unit of work needs of a database."""

    def open_session(self, scope: Scope | None) -> OpenSession[S]:
        """Make a session; its first statement checks a connection out."""
        ...


async def end_together(
    working: list[OpenSession[Any]], *, commit: bool, close: bool
) -> BaseException | None:
    """End them in order; what failed first.

    A COMMIT that fails rolls back those after it; but where all are prepared, it is decided: each
    can only be committed, be it by another hand.
    """
    begun, failure = await _begin_each(working) if commit else (0, None)
    # Its own thread may still be at it, or else it has rolled back.
    interrupted = begun if failure and not isinstance(failure, Exception) else None
    decided = bool(begun) and not failure and all(each.orm.twophase for each in working)
    transactions = [prepared(each.orm) for each in working] if decided else []
    if decided:
        note_decision(transactions)
    for number, opened in enumerate(working):
        if number == interrupted:
            continue
        go_on = decided or (commit and failure is None)
        try:
            await opened.run(end, opened.orm, opened.turn, go_on, close, number < begun)
        except BaseException as error:
            failure = failure or error
            if decided:
                note_doubt(transactions[number], error)
    return failure


async def _begin_each(working: list[OpenSession[Any]]) -> tuple[int, BaseException | None]:
    """Have all fail, if one must, before the first is committed; how many were begun."""
    for number, opened in enumerate(working):
        try:
            await opened.run(begin_end, opened.orm, opened.turn)
        except BaseException as error:
            return number, error
    return len(working), None
