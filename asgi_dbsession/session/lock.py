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
        trio: Any = sys.modules.get("trio")  # without trio loaded, this is a worker thread
        if trio is None:
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
    """One commit or rollback of all work of a unit, in one or in several threads.

    Args:
        commit: False rolls back.
        reason: Why the work is not committed.
        close: Whether the sessions are closed permanently.
        task: The task whose work it is; None for the work of all tasks.
        error: What the application raised.

    Attributes:
        handled: The exception that the application was handling when it asked for the end.
        requested_by: The task and the thread that asked for the end, and wait for it. A lock that
            they still hold was abandoned, by an exception out of a signal handler.
        had_work: Whether there was anything to commit or roll back.
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


# Set while sessions end. A listener that SQLAlchemy calls meanwhile is part of that end.
current_end: ContextVar[End | None] = ContextVar("asgi_dbsession.end", default=None)


class SessionLock(ABC):
    """A monitor: each method decides at once, or waits until the lock is released.

    An operation acquires the lock, and is refused while another caller is in an operation. An end
    waits for the operation in flight. An operation that begins while an end waits or runs waits
    for that end.

    The mutex is an `RLock`: a signal handler or a finalizer may use the session while its own
    thread holds the mutex. No exception can leave it locked, because `with` acquires and releases
    it without running Python code.

    Attributes:
        is_closed: Whether no operation may begin any more.
        users: The tasks that used the session since the last end. Those that have ended are moved
            to the two flags below sooner or later.
        has_finished_work: Whether a task that has ended well used it since, or an unknown caller.
        has_failed_work: Whether a task used it since that has ended with an exception.
        admit: Raises unless the caller may use the session now. Set by the first
            `begin(join=True)`: while its block is open, the session is for that block alone.
    """

    admit: Callable[[], None] | None = None

    users: set[Any]
    has_finished_work: bool
    has_failed_work: bool

    def __init__(self, database: object) -> None:
        self.database: object = database
        self.is_closed: bool = False
        self.forget_users()
        self._mutex = RLock()
        self._holder: object = None
        self._is_held_by_end = False
        self._ends = 0  # how many run or wait
        self._waiters: list[Future[None]] = []

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
            False inside an operation of the same caller (autoflush, lazy loading). The outermost
            operation releases the lock.

        Raises:
            ConcurrentUse: Another task or thread is in the middle of an operation.
            SessionClosed: The unit of work has ended.
            ConfigurationError: A thread uses the session of an event loop.
        """
        caller = self._caller()
        while True:
            with self._mutex:
                if self._holder == caller:
                    return False
                if self.is_closed:
                    raise SessionClosed(self.database)
                if not self._ends:
                    if self._holder is not None:
                        raise ConcurrentUse(self.database)
                    if self.admit is not None:
                        self.admit()
                    self._holder = caller
                    self._add_user(self._user(caller))
                    return True
                released = self._new_waiter()
            self._wait(released)

    def acquire_for_end(self, end: End, *, of_block: bool = False) -> None:
        """Begin a commit or rollback of all work so far, once the operation in flight is done.

        Args:
            end: The commit or rollback.
            of_block: Whether it only ends a savepoint, and the work before it goes on.

        Raises:
            SessionClosed: The unit of work has ended.
        """
        with self._mutex:
            self._ends += 1
        try:
            while True:
                with self._mutex:
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
            with self._mutex:
                self._ends -= 1
                self._wake_all()
            raise

    def acquire_for_end_if_free(self) -> bool:
        """The same unless somebody uses the session; never waits."""
        try:
            caller = self._caller()
        except ConfigurationError:  # a thread, which ends no session of an event loop
            return False
        with self._mutex:
            if self.is_busy or self.is_closed:
                return False
            self._ends += 1
            self._holder, self._is_held_by_end = caller, True
            return True

    def release(self, *, closed: bool = False) -> None:
        """Finish an operation or an end; with `closed`, no operation begins any more."""
        with self._mutex:
            if self._is_held_by_end:
                self._is_held_by_end = False
                self._ends -= 1
            self.is_closed = self.is_closed or closed
            self._holder = None
            self._wake_all()

    def is_held_by_end_of_caller(self) -> bool:
        """Whether the caller is the end that holds the lock, or was called by it."""
        return self._is_held_by_end and self._holder == self._caller()

    def record_user(self) -> None:
        """Record that the caller uses the session, for what only changes it in memory.

        Raises:
            As `acquire`; an operation in flight is no reason for `ConcurrentUse`.
        """
        with self._mutex:
            if self.is_closed:
                raise SessionClosed(self.database)
            if self.admit is not None and self._holder != self._caller():
                self.admit()
            self._add_user(self._user(self._caller()))

    def sort_out_users(self) -> None:
        """Move the tasks that have ended from `users` to the two flags."""
        with self._mutex:
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
        if task is None:
            self.has_finished_work = True
        elif task not in self.users:
            if self.users:
                # Or the helper tasks of a long stream would pile up.
                self.sort_out_users()
            self.users.add(task)

    def _new_waiter(self) -> "Future[None]":
        released: Future[None] = Future()
        self._waiters.append(released)
        return released

    def _wake_all(self) -> None:
        waiters, self._waiters = self._waiters, []
        for released in waiters:
            if released.set_running_or_notify_cancel():  # else its waiter was cancelled
                released.set_result(None)

    @abstractmethod
    def _caller(self) -> object: ...

    @abstractmethod
    def _user(self, caller: object) -> object: ...

    @abstractmethod
    def _wait(self, released: "Future[None]") -> None: ...


class TaskLock(SessionLock):
    """For the session of an event loop: its callers are tasks."""

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
    def _user(self, caller: object) -> object:
        return caller

    @override
    def _wait(self, released: "Future[None]") -> None:
        await_only(asyncio.wrap_future(released))
