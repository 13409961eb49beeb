"""The lock of a session: only one task or thread at a time may use the session."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from threading import RLock, get_ident
from typing import Any

from asgi_dbsession.errors import ConcurrentUse, SessionClosed

from .end import End, requester
from .tasks import has_ended, has_failed, is_on_event_loop

_logger = logging.getLogger("asgi_dbsession")


class SessionLock(ABC):
    """The lock of a session. Each operation, commit and rollback of the session holds the lock.

    An operation that begins while another operation runs raises `ConcurrentUse`. A commit or
    rollback waits for the running operation, and new operations wait for a commit or rollback.

    Attributes:
        mutex: Held while attributes change. An `RLock`, because a signal handler may acquire it
            again.
        ends: All commits and rollbacks that run or wait.
        is_closed: True after the request or `begin()` block has ended: operations are refused.
        users: The running tasks that used the session since the last commit or rollback.
        has_finished_work: True if a task that returned, or code outside a task, used the session.
        has_failed_work: True if a task that used the session has failed or was cancelled.
        last_user: The task that used the session last, also before the last commit.
        admit: A function that raises an error outside of the open `begin(join=True)` block.
    """

    admit: Callable[[], None] | None = None
    is_closed: bool = False
    ends: frozenset[End] = frozenset()
    has_finished_work: bool = False
    has_failed_work: bool = False
    last_user: object = None
    _holder: object = None
    _held_for: End | None = None  # The commit or rollback that holds the session's lock now.
    _reserved_for: End | None = None  # A commit or rollback. New operations wait until it has run.
    _waiters: "tuple[Future[None], ...]" = ()
    _delayed: tuple[tuple[object, Callable[[], None]], ...] = ()

    def __init__(self, database: object) -> None:
        self.database: object = database
        self.users: set[Any] = set()
        self.mutex: RLock = RLock()

    @property
    def is_busy(self) -> bool:
        """True if an operation, a commit or a rollback uses the session, or waits to use it."""
        return self._holder is not None or bool(self.ends)

    @property
    def is_used(self) -> bool:
        """True if a task or thread used the session since the last commit or rollback."""
        return bool(self.users) or self.has_finished_work or self.has_failed_work

    def acquire(self) -> bool:
        """Acquire the lock for an operation.

        Returns:
            True if the caller must call `release`. False if the caller holds the lock already.

        Raises:
            ConcurrentUse: Another task or thread is in the middle of an operation of this session.
            SessionClosed: The unit of work of the session has ended.
        """
        caller = self._caller()
        # See without `mutex` if the caller holds the lock: only the caller can make itself holder.
        if self._holder == caller:
            return False
        while True:
            with self.mutex:
                if self.is_closed:
                    raise SessionClosed(self.database)
                if not self.ends or self._is_reserved_for_caller():
                    if self._holder is not None and not self._is_abandoned(get_ident()):
                        raise ConcurrentUse(self.database)
                    if self.admit is not None:
                        self.admit()
                    self._hold(caller)
                    if caller is not self.last_user or caller not in self.users:
                        self._add_user(caller)
                    return True
                released = self._new_waiter()
            self._wait(released)

    def reserve_for(self, end: End) -> None:
        """Let no operation begin until the commit or rollback `end` has acquired the lock.

        Otherwise another task could begin an operation first, and `end` would commit its work.
        """
        with self.mutex:
            self._reserved_for, self.ends = end, self.ends | {end}

    def cancel_reservation(self, end: End) -> None:
        """Let the operations begin that `reserve_for` made wait for the commit or rollback `end`.

        Do nothing if `end` has acquired the lock already. Its release will let them begin.
        """
        with self.mutex:
            if self._reserved_for is end:
                self._reserved_for, self.ends = None, self.ends - {end}
                if self._holder is None:
                    self._change_delayed()
                self._wake_all()

    def _is_reserved_for_caller(self) -> bool:
        # Return True in a listener of the flush of another session (or of the rollback of a failed
        # task's session) before this commit. If the listener waited, each would wait for the other.
        return not self._held_for and [each.requested_by for each in self.ends] == [requester()]

    def acquire_for_end(self, end: End, *, of_block: bool = False) -> None:
        """Wait for the running operation, then acquire the lock for a commit or rollback."""
        try:
            while True:
                with self.mutex:
                    self.ends |= {end}
                    if self._reserved_for is end:
                        self._reserved_for = None
                    if self.is_closed:
                        raise SessionClosed(self.database)
                    task, thread = end.requested_by
                    if self._holder in (None, task) or self._is_abandoned(thread, end.requested_at):
                        self.ends, self._held_for = self.ends - {self._held_for}, end
                        self._hold(self._caller())
                        if not of_block:
                            self.forget_users()
                        return
                    released = self._new_waiter()
                self._wait(released)
        # Wake the operations that wait for this commit or rollback. It will not run, because its
        # own wait for the session's lock has failed or was cancelled.
        except BaseException:
            with self.mutex:
                self.ends -= {end}
                self._wake_all()
            raise

    def release(self, *, closed: bool = False) -> None:
        """Release the lock. If `closed` is True, refuse all later operations of the session."""
        with self.mutex:
            if self._delayed:
                self._change_delayed()
            if self._held_for is not None:
                self.ends -= {self._held_for}
                self._held_for = None
            if closed:
                self.is_closed = True
            self._holder = None
            if self._waiters:
                self._wake_all()

    def close(self) -> None:
        """Refuse all later operations of the session. The caller must hold `mutex`."""
        self.is_closed = True
        self._wake_all()

    def delay(self, change: Callable[..., None], *args: Any, **kwargs: Any) -> bool:
        """If a commit or rollback runs or waits, call `change` (such as `session.add`) after it.

        Return False if the caller must call `change` now instead.

        Raises:
            SessionClosed: No later COMMIT would store the change.
        """
        if not is_on_event_loop():
            return False
        caller = self._caller()
        with self.mutex:
            if not self.ends or self._holder == caller or self._is_reserved_for_caller():
                return False
            if any(each.close for each in self.ends):
                raise SessionClosed(self.database)
            if self.admit is not None:
                self.admit()
            self._delayed = (*self._delayed, (caller, partial(change, *args, **kwargs)))
        return True

    def _change_delayed(self) -> None:
        """Make the calls (of `session.add`, for example) that a commit or rollback has delayed."""
        if self.ends - {self._held_for} and not any(each.close for each in self.ends):
            return  # The next commit or rollback is waiting for the lock: let it run first.
        delayed, self._delayed = self._delayed, ()
        for caller, change in delayed:
            self._add_user(caller)
            try:
                change()
            # Log the error of the delayed call, and let the session be rolled back. In the
            # application, `session.add()` (for example) has returned, and cannot raise the error.
            except Exception:
                self.has_failed_work = True
                _logger.exception("A change of a session of %s failed", self.database)

    def is_held_by_end_of_caller(self) -> bool:
        """Return True if the current task or thread holds the lock for a commit or rollback."""
        return self._held_for is not None and self._holder == self._caller()

    def sort_out_users(self) -> None:
        """Remove ended tasks from `users` (tasks that used the session). Record if one failed."""
        with self.mutex:
            for task in [each for each in self.users if has_ended(each)]:
                self.users.discard(task)
                self.has_failed_work = self.has_failed_work or has_failed(task)
                self.has_finished_work = self.has_finished_work or not has_failed(task)

    def forget_users(self) -> None:
        """Forget which tasks used the session, because all work is committed or rolled back."""
        self.users, self.has_finished_work, self.has_failed_work = set(), False, False

    def _add_user(self, task: object) -> None:
        self.last_user = task
        if task is None:
            self.has_finished_work = True
        elif task not in self.users:
            if self.users:
                # Remove ended tasks, so that `users` does not grow in a long streaming response.
                self.sort_out_users()
            self.users.add(task)

    @abstractmethod
    def _hold(self, caller: object) -> None: ...

    @abstractmethod
    def _is_abandoned(self, thread: int, since: float = 0) -> bool:
        """Return True if the holder of the lock has ended, and so will never release the lock."""

    def _new_waiter(self) -> "Future[None]":
        released: Future[None] = Future()
        self._waiters = (*self._waiters, released)
        return released

    def _wake_all(self) -> None:
        for released in self._waiters:
            with suppress(InvalidStateError):  # Skip tasks that were cancelled while they waited.
                released.set_result(None)
        self._waiters = ()

    @abstractmethod
    def _caller(self) -> object: ...

    @abstractmethod
    def _wait(self, released: "Future[None]") -> None: ...
