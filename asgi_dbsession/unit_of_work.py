"""Which sessions a unit of work opened, and how they end together."""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import Any, Generic, Protocol, TypeVar

from sqlalchemy.orm import Session

from .after_commit import AfterCommit, Function, is_in_thread
from .completion import run_to_completion
from .errors import ConfigurationError, NoSession, SessionClosed, Unwound
from .transaction import begin_end, close_at_once, end, has_work
from .turn import Turn, current_end
from .two_phases import note_decision, note_doubt, prepared
from .types import Scope

S = TypeVar("S")


def current_task() -> object:
    """The running task; None in a worker thread, which has none, and on trio."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


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
        """Whether all that was done here since the last end is done, and by one of these tasks.

        A blocking session is worked on by threads, which say nothing of tasks: there, whether one
        of them opened it.
        """
        worker = self.opener if self.session is self.orm else self.turn.worker
        return worker in tasks and not self.turn.is_busy


class SessionSource(Protocol[S]):
    """What a unit of work needs of a database."""

    def open_session(self, scope: Scope | None) -> OpenSession[S]:
        """Make a session; its first statement checks a connection out."""
        ...


class UnitOfWork:
    """The sessions of one request, or of one `begin()`.

    It is put into the context empty and filled from below: what is set in a context further down
    (by an inner middleware's task, by a worker thread) would be invisible up here.

    Args:
        databases: What it opens sessions of; the first of each kind is the default.
        scope: The ASGI scope it serves, for `session.info["scope"]`.
        enclosing: Where other databases are looked for.

    Attributes:
        joins: Whether `enclosing` is of the same request; databases that it has stay with it.
        rollback: What `set_rollback` said of the work since the last end.
        failure: The first error of a COMMIT.
        after_commit: What `on_commit` was given.
        two_phase: Whether its sessions commit in two phases.
        is_blocking: Whether it ends on the calling thread.
        is_answered: Whether it is too late for another response.
        may_commit: Whether what is left when the application returns belongs to a success.
        over: Whether it has been closed.
    """

    def __init__(
        self,
        databases: tuple[SessionSource[Any], ...],
        scope: Scope | None,
        enclosing: "UnitOfWork | None",
    ) -> None:
        self.databases: tuple[SessionSource[Any], ...] = databases
        self.scope: Scope | None = scope
        self.enclosing: UnitOfWork | None = enclosing
        self.sessions: dict[SessionSource[Any], OpenSession[Any]] = {}
        self.joins: bool = False
        self.rollback: bool | None = None
        self.failure: Exception | None = None
        self.after_commit: tuple[AfterCommit, ...] = ()
        self.two_phase: bool = False
        self.is_blocking: bool = False
        self.is_answered: bool = False
        self.may_commit: bool = False
        self.over: bool = False

    def manages(self, database: SessionSource[Any]) -> bool:
        """Whether the session of that database is opened and ended here."""
        if database not in self.databases:
            return False
        return not (self.joins and self.enclosing and self.enclosing.has(database))

    def has(self, database: SessionSource[Any]) -> bool:
        """Whether this unit of work or one of the same request around it manages the database."""
        return database in self.databases or bool(
            self.joins and self.enclosing and self.enclosing.has(database)
        )

    def within(self, databases: tuple[SessionSource[Any], ...]) -> "UnitOfWork":
        """A unit of its own, opened inside of this one."""
        return UnitOfWork(databases, self.scope, self)

    @property
    def outermost(self) -> "UnitOfWork":
        """The one that ends last, of those of the same request."""
        unit = self
        while unit.joins and unit.enclosing is not None:
            unit = unit.enclosing
        return unit

    def open(self, database: SessionSource[S]) -> S:
        """The session of a database that this unit manages, made on first use.

        Raises:
            SessionClosed: The unit of work is over.
            DatabaseNotRunning: The database has not been started.
        """
        opened: OpenSession[S] | None = self.sessions.get(database)
        if opened is None and not self.over:
            opened = self.sessions.setdefault(database, database.open_session(self.scope))
            if self.two_phase:
                opened.orm.twophase = True
            for after_commit in self.outermost.after_commit:
                after_commit.follow(opened.orm)
        if opened is None:
            raise SessionClosed(database)
        if self.over:  # it ended in another thread while this one opened a session
            close_at_once(opened.orm, opened.turn)
            raise SessionClosed(database)
        return opened.session

    async def end(self, *, commit: bool, only_of: tuple[object, ...] | None = None) -> None:
        """Commit or roll back what was done so far, in declared order. Sessions stay usable.

        Several sessions are all flushed before the first is committed. Runs to completion although
        it is cancelled. After a COMMIT that failed, the others are rolled back, and `failure` keeps
        the error whatever becomes of the exception. `on_commit` functions follow.

        Args:
            commit: False rolls back.
            only_of: Do nothing unless all of it is the work of one of these tasks; None among
                them is a task that nobody knows.

        Raises:
            Unwound: What flush and COMMIT raised is its cause.
        """
        working = [each for each in self._in_order() if has_work(each.orm, each.turn)]
        if not working and not self.after_commit:
            return
        if only_of is not None and not all(each.is_work_of(only_of) for each in working):
            return
        self.rollback = None
        try:
            await run_to_completion(self._end_each(working, commit=commit, close=False))
        except Exception as error:
            raise Unwound from error

    async def close(self, *, commit: bool) -> None:
        """The same for good: nothing opened here can check out a connection afterwards."""
        self.over = True
        if not (self.sessions or self.after_commit):
            return
        working = [each for each in self._in_order() if not close_at_once(each.orm, each.turn)]
        if working or self.after_commit:
            await run_to_completion(self._end_each(working, commit=commit, close=True))
        self.sessions.clear()

    def close_blocking(self, *, commit: bool) -> None:
        """The same on the calling thread, for a unit that has sync sessions only."""
        self.over = True
        given, success = self.after_commit, False
        token = current_end.set(self)
        stored = [each for each in given if each.is_stored]
        try:
            for each in self._in_order():
                if not close_at_once(each.orm, each.turn):
                    end(each.orm, each.turn, commit, close=True)
            success = commit
        finally:
            current_end.reset(token)
            self.sessions.clear()
            for function in self._settle(given, stored, success=success):
                self._follow_up_blocking(function)

    def _in_order(self) -> list[OpenSession[Any]]:
        return [self.sessions[each] for each in self.databases if each in self.sessions]

    async def _end_each(
        self, working: list[OpenSession[Any]], *, commit: bool, close: bool
    ) -> None:
        given = self.after_commit
        stored = [each for each in given if each.is_stored] if given else []
        failure: BaseException | None = None
        token = current_end.set(working)
        try:
            if len(working) > 1:
                failure = await _end_together(working, commit=commit, close=close)
            elif working:
                (opened,) = working
                await opened.run(end, opened.orm, opened.turn, commit, close)
        except Exception as error:
            failure = error
        finally:
            current_end.reset(token)
        if self.after_commit:
            stored = self._settle(given, stored, success=commit and failure is None)
        for each in stored:
            await self._follow_up(each)
        if isinstance(failure, Exception):
            self.failure = failure
        if failure is not None:
            raise failure

    def _settle(
        self, given: tuple[AfterCommit, ...], stored: list[AfterCommit], *, success: bool
    ) -> list[AfterCommit]:
        """Which functions to call now; what was given meanwhile may be about what follows."""
        settled = [
            each
            for each in self.after_commit
            if self.over or each in given or each.is_stored or each.is_undone
        ]
        self.after_commit = tuple(each for each in self.after_commit if each not in settled)
        for each in settled:
            each.forget()
        if success:
            stored = [each for each in settled if each.is_stored or not each.is_undone]
        return stored

    async def _follow_up(self, after_commit: AfterCommit) -> None:
        unit = self._unit_for_function()
        token = current_unit.set(unit)
        try:
            success = await after_commit.call()
            await unit.close(commit=success and not unit.rollback)
        except Exception as error:
            after_commit.report(error)
        finally:
            current_unit.reset(token)

    def _follow_up_blocking(self, after_commit: AfterCommit) -> None:
        unit = self._unit_for_function()
        token = current_unit.set(unit)
        try:
            success = after_commit.call_blocking()
            unit.close_blocking(commit=success and not unit.rollback)
        except Exception as error:
            after_commit.report(error)
        finally:
            current_unit.reset(token)

    def _unit_for_function(self) -> "UnitOfWork":
        unit = UnitOfWork(self.databases, self.scope, self)
        unit.is_blocking, unit.two_phase = self.is_blocking, self.two_phase
        return unit


async def _end_together(
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


current_unit: ContextVar[UnitOfWork | None] = ContextVar("asgi_dbsession", default=None)


def unit_that_manages(database: SessionSource[Any]) -> UnitOfWork:
    """The nearest unit of work that has a session of the database.

    Raises:
        NoSession: There is none here.
    """
    unit = current_unit.get()
    while unit is not None:
        if unit.manages(database):
            return unit
        unit = unit.enclosing
    raise NoSession(database)


def set_rollback(rollback: bool) -> None:
    """Decide how the current unit of work ends, whatever the status of the response says.

    Args:
        rollback: True rolls back also on success; False commits also on a status of 400 and
            above (a failed login that must be counted, say). An exception that nobody turns into
            a response rolls back in any case.

    Raises:
        NoSession: No unit of work is open here.
        SessionClosed: The request that this task belongs to is over.
    """
    unit = _unit()
    unit.rollback = rollback
    while unit.joins and unit.enclosing is not None:
        unit = unit.enclosing
        unit.rollback = rollback


def on_commit(function: Function) -> None:
    """Call a function once the work of the current unit is stored, and before the client hears.

    It is dropped when that work is rolled back, be it by the application, and be it only to a
    savepoint that was open when it was given; so give it after the work it belongs to. Where the
    application commits by itself, it is called when the unit of work ends.

    They are called in order and run to completion although the request is cancelled. What one
    raises is logged by the logger `asgi_dbsession`: it neither unmakes the COMMIT nor skips the
    others. Each has a unit of work of its own: `get_session()` is another session there, committed
    when the function returns, and followed up by the functions that it gives itself.

    Args:
        function: Takes no arguments. A coroutine function is awaited; a plain one is called where
            it was given: on the event loop, or, by a `def` handler, in a worker thread.

    Raises:
        NoSession: No unit of work is open here.
        SessionClosed: The request that this task belongs to is over.
        ConfigurationError: It is a coroutine function, and the unit is `SyncDatabase.begin()`.
    """
    unit = _unit(also_at_end=True)
    if unit.is_blocking and iscoroutinefunction(function):
        raise ConfigurationError(
            f"on_commit takes a plain function inside SyncDatabase.begin(), not {function!r}."
        )
    after_commit = AfterCommit(function, in_thread=not unit.is_blocking and is_in_thread())
    while True:
        for opened in unit.sessions.values():
            after_commit.follow(opened.orm)
        if not unit.joins or unit.enclosing is None:
            break
        unit = unit.enclosing
    unit.after_commit = (*unit.after_commit, after_commit)


def _unit(*, also_at_end: bool = False) -> UnitOfWork:
    unit = current_unit.get()
    if unit is None:
        raise NoSession("any database")
    if unit.over and not (also_at_end and current_end.get()):  # a listener of its last flush
        raise SessionClosed("any database")
    return unit
