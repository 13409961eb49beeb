"""Lets one caller at a time use a session, and nobody after it was closed."""

import asyncio
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import RLock, get_ident
from typing import Any, Literal, TypeAlias

from sqlalchemy.util import await_only
from typing_extensions import override

from asgi_dbsession.errors import ConcurrentUse, ConfigurationError, SessionClosed

from .tasks import has_ended, has_failed


def current_task() -> object:
    """The running task of asyncio or trio; None in a worker thread."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        trio: Any = sys.modules.get("trio")
        if trio is None:  # not loaded, so this is a worker thread
            return None
    try:
        task: object = trio.lowlevel.current_task()
    except RuntimeError:
        return None
    return task


Reason: TypeAlias = Literal[
    "status", "set_rollback", "exception", "cancelled", "unfinished", "commit_failed"
]


@dataclass(slots=True, eq=False)
class End:
    """One commit or rollback of a unit, in one or in several threads.

    Args:
        commit: False rolls back.
        reason: Why the work is not committed.
        close: Whether the sessions are closed permanently.
        task: The task whose work it is; None for all.
        error: What the application raised.

    Attributes:
        handled: The exception that the application was handling when it asked for the end.
        requested_by: The task and the thread that wait for the end. A lock that they still hold
            was abandoned, by an exception out of a signal handler.
        had_work: Whether there was any work to end.
        failure: What the end itself raised.
    """

    commit: bool
    reason: Reason
    close: bool = False
    task: object = None
    error: BaseException | None = None
    requested_by: tuple[object, int] = field(default_factory=lambda: (current_task(), get_ident()))
    handled: BaseException | None = field(default_factory=sys.exception)
    had_work: bool = False
    failure: BaseException | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the work was committed."""
        return self.commit and self.failure is None


# Set while sessions end, for listeners that SQLAlchemy calls meanwhile.
current_end: ContextVar[End | None] = ContextVar("asgi_dbsession.end", default=None)


class SessionLock(ABC):
    """A monitor: each method decides at once, or waits until the lock is released.

    An operation is refused while another one is in flight. An end waits for it, and an operation
    that begins meanwhile waits for the end.
    The mutex is an `RLock`, because a signal handler may use the session while its own thread holds
    it. No exception leaves it locked, because `with` runs no Python code of its own.

    Attributes:
        is_closed: Whether no operation may begin any more.
        users: The tasks that used the session since the last end; those that have ended move on.
        has_finished_work: Whether a task used it that has ended well, or an unknown caller.
        has_failed_work: Whether a task used it that has ended with an exception.
        admit: Raises unless the caller may use the session now; set by `begin(join=True)`.
    """

    admit: Callable[[], None] | None = None
    is_closed: bool = False
    has_finished_work: bool = False
    has_failed_work: bool = False
    _is_held_by_end = False
    _holder: object = None
    _ends = 0  # that run or wait
    _waiters: "tuple[Future[None], ...]" = ()

    def __init__(self, database: object) -> None:
        self.database: object = database
        self.users: set[Any] = set()
        self.mutex: RLock = RLock()

    @property
    def is_busy(self) -> bool:
        """Whether an operation or an end runs or waits."""
        return self._holder is not None or self._ends > 0

    @property
    def is_used(self) -> bool:
        """Whether anyone used the session since the last end."""
        return bool(self.users) or self.has_finished_work or self.has_failed_work

    def acquire(self) -> bool:
        """Begin an operation.

        Returns:
            False inside an operation of the same caller, which releases the lock.

        Raises:
            ConcurrentUse: Another task or thread is in the middle of an operation.
            SessionClosed: The unit of work has ended.
        """
        caller = self._caller()
        if self._holder == caller:  # only the caller itself can change that
            return False
        while True:
            with self.mutex:
                if self.is_closed:
                    raise SessionClosed(self.database)
                if not self._ends:
                    if self._holder is not None:
                        raise ConcurrentUse(self.database)
                    if self.admit is not None:
                        self.admit()
                    self._holder = caller
                    self._add_user(caller)
                    return True
                released = self._new_waiter()
            self._wait(released)

    def acquire_for_end(self, end: End, *, of_block: bool = False) -> None:
        """Begin an end (with `of_block`, that of a savepoint) after the operation in flight."""
        with self.mutex:
            self._ends += 1
        try:
            while True:
                with self.mutex:
                    if self.is_closed:
                        raise SessionClosed(self.database)
                    if self._holder is None or self._holder in end.requested_by:
                        self._holder, self._is_held_by_end = self._caller(), True
                        if not of_block:
                            self.forget_users()
                        return
                    released = self._new_waiter()
                self._wait(released)
        except BaseException:  # cancelled together with its event loop
            with self.mutex:
                self._ends -= 1
                self._wake_all()
            raise

    def release(self, *, closed: bool = False) -> None:
        """Finish an operation or an end; with `closed`, no operation begins any more."""
        with self.mutex:
            if self._is_held_by_end:
                self._is_held_by_end, self._ends = False, self._ends - 1
            if closed:
                self.is_closed = True
            self._holder = None
            if self._waiters:
                self._wake_all()

    def is_held_by_end_of_caller(self) -> bool:
        """Whether the caller is, or was called by, the end that holds the lock."""
        return self._is_held_by_end and self._holder == self._caller()

    def record_user(self) -> None:
        """Record that the caller uses the session, for what only changes its memory."""
        caller = self._caller()
        with self.mutex:
            if self.is_closed:
                raise SessionClosed(self.database)
            if self.admit is not None and self._holder != caller:
                self.admit()
            self._add_user(caller)

    def sort_out_users(self) -> None:
        """Remove tasks that have ended from `users`, and note in the two flags how they ended."""
        with self.mutex:
            for task in [each for each in self.users if has_ended(each)]:
                self.users.discard(task)
                if has_failed(task):
                    self.has_failed_work = True
                else:
                    self.has_finished_work = True

    def forget_users(self) -> None:
        """Forget who used the session, because all work was committed or rolled back."""
        self.users, self.has_finished_work, self.has_failed_work = set(), False, False

    def _add_user(self, task: object) -> None:
        if task not in self.users:
            if self.users:
                # Or the helper tasks of a long stream would pile up.
                self.sort_out_users()
            self.users.add(task)

    def _new_waiter(self) -> "Future[None]":
        released: Future[None] = Future()
        self._waiters = (*self._waiters, released)
        return released

    def _wake_all(self) -> None:
        waiters, self._waiters = self._waiters, ()
        for released in waiters:
            if released.set_running_or_notify_cancel():  # else its waiter was cancelled
                released.set_result(None)

    @abstractmethod
    def _caller(self) -> object: ...

    @abstractmethod
    def _wait(self, released: "Future[None]") -> None: ...


class TaskLock(SessionLock):
    """The lock of an async session: a caller is a task."""

    @override
    def _caller(self) -> object:
        try:
            return asyncio.current_task()
        except RuntimeError as error:
            raise ConfigurationError(
                f"This session of {self.database} was used in a thread, where nothing can be "
                "awaited. Use it in an `async def` function, or give DBSessionMiddleware a "
                "SyncDatabase for functions written with `def`."
            ) from error

    @override
    def _wait(self, released: "Future[None]") -> None:
        await_only(asyncio.wrap_future(released))
