"""Which sessions a unit of work opened, and how it ends."""

from asyncio import CancelledError
from collections.abc import Collection
from contextvars import ContextVar
from typing import Any, TypeVar

from asgi_dbsession.errors import SessionClosed, Unwound
from asgi_dbsession.session.commit import close_at_once, end, has_work
from asgi_dbsession.session.completion import call_here, complete_here, run_to_completion
from asgi_dbsession.session.lock import current_end
from asgi_dbsession.types import Scope

from .after_commit import AfterCommit
from .managed_session import OpenSession, SessionSource, end_together

S = TypeVar("S")


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
        decider: The task that said so.
        is_used: Whether anything was asked of it: a session, `on_commit`, `set_rollback`.
        failure: The first error of a COMMIT.
        after_commit: What `on_commit` was given.
        two_phase: Whether its sessions commit in two phases.
        is_blocking: Whether it ends on the calling thread, which waits for nothing else.
        is_answered: Whether it is too late for another response.
        may_commit: Whether what is left when the application returns belongs to a success.
        over: Whether it has been closed.
    """

    # Here, for a request pays for each attribute that it has of its own.
    decider: object = None
    two_phase: bool = False
    is_blocking: bool = False

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
        self.is_used: bool = False
        self.rollback: bool | None = None
        self.failure: Exception | None = None
        self.after_commit: tuple[AfterCommit, ...] = ()
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
    def visible_databases(self) -> tuple[SessionSource[Any], ...]:
        """Those of this unit and of those of the same request around it, the nearest first."""
        if not self.joins or self.enclosing is None:
            return self.databases
        further = self.enclosing.visible_databases
        return (*self.databases, *(each for each in further if each not in self.databases))

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
        self.is_used = True
        opened: OpenSession[S] | None = self.sessions.get(database)
        if opened is None and not self.over:
            opened = self.sessions.setdefault(database, database.open_session(self.scope))
            if self.two_phase:
                opened.orm.twophase = True
            if self.is_blocking:
                opened.run = call_here
            for after_commit in (self.outermost if self.joins else self).after_commit:
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
            only_of: Do nothing unless all of it is the work of these tasks; see
                `OpenSession.is_work_of`.

        Raises:
            Unwound: What flush and COMMIT raised is its cause.
        """
        working = []
        for each in list(self.sessions.values()):  # a copy, for a thread may open another one
            if has_work(each.orm, each.turn):
                working.append(each)
            else:  # the application has ended it by itself: what follows is another task's, perhaps
                each.turn.workers.clear()
        if not working and not self.after_commit:
            # It was about nothing, and must not be about what follows; but of another task, it is
            # about what that one has not begun yet.
            if only_of is None or self.decider in only_of:
                self.rollback = None
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
        opened = list(self.sessions.values())  # a thread may be about to open another one
        working = [each for each in opened if not close_at_once(each.orm, each.turn)]
        if working or self.after_commit:
            ending = self._end_each(working, commit=commit, close=True)
            await (ending if self.is_blocking else run_to_completion(ending))
        self.sessions.clear()

    def close_blocking(self, *, commit: bool) -> None:
        """The same on the calling thread, for a unit that `is_blocking`."""
        complete_here(self.close(commit=commit))

    def _in_order(self, opened: Collection[OpenSession[Any]]) -> list[OpenSession[Any]]:
        sessions = [self.sessions.get(each) for each in self.databases]
        return [each for each in sessions if each is not None and each in opened]

    async def _end_each(
        self, working: list[OpenSession[Any]], *, commit: bool, close: bool
    ) -> None:
        given = self.after_commit
        stored = [each for each in given if each.is_stored] if given else []
        failure: BaseException | None = None
        token = current_end.set(working)
        try:
            if len(working) > 1:
                failure = await end_together(self._in_order(working), commit=commit, close=close)
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
            self.failure = self.failure or failure
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
        if success:
            stored = [each for each in settled if each.is_due]
        for each in settled:
            each.forget()
        return stored

    async def _follow_up(self, after_commit: AfterCommit) -> None:
        unit = self._unit_for(after_commit)
        token = current_unit.set(unit)
        try:
            try:
                if self.is_blocking:
                    after_commit.call_blocking()
                else:
                    await after_commit.call()
            except BaseException:
                await unit.close(commit=False)
                raise
            await unit.close(commit=not unit.rollback)
        except (Exception, CancelledError) as error:  # of a task of its own: this one completes
            after_commit.report(error)
        finally:
            current_unit.reset(token)

    def _unit_for(self, after_commit: AfterCommit) -> "UnitOfWork":
        unit = self.within(after_commit.databases)
        unit.is_blocking, unit.two_phase = self.is_blocking, self.two_phase
        return unit


current_unit: ContextVar[UnitOfWork | None] = ContextVar("asgi_dbsession", default=None)
