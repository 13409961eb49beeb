"""Tests the lock: operations refuse each other, commits wait, and nothing waits forever."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from sqlalchemy.util import greenlet_spawn

from asgi_dbsession import ConcurrentUse, ConfigurationError, SessionClosed
from asgi_dbsession.session.end import End, current_end
from asgi_dbsession.session.lock import SessionLock
from asgi_dbsession.session.task_lock import TaskLock
from asgi_dbsession.session.thread_lock import ThreadLock


@pytest.fixture
def restless() -> Iterator[None]:
    """Switch threads as often as possible."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def an_end() -> End:
    return End(commit=True, reason="status")


def in_other_thread(function: Callable[[], Any]) -> Any:
    """Call a function in a new thread, and return its result or exception."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(10)


@pytest.mark.usefixtures("restless")
def test_operations_and_ends_of_many_threads_follow_each_other() -> None:
    """A commit and an operation wait for each other; two operations refuse each other."""
    lock = ThreadLock("the database", None)
    inside: list[str] = []
    overlaps: list[list[str]] = []
    rounds = 2000

    def check(who: str) -> None:
        inside.append(who)
        if len(inside) > 1:
            overlaps.append(list(inside))
        inside.remove(who)

    def operate(who: str) -> None:
        for _ in range(rounds):
            try:
                lock.acquire()
            except ConcurrentUse:
                continue
            check(who)
            lock.release()

    def end(who: str) -> None:
        for _ in range(rounds):
            this = an_end()
            token = current_end.set(this)
            lock.acquire_for_end(this)
            check(who)
            lock.release()
            current_end.reset(token)

    threads = [
        threading.Thread(target=what, args=(f"{what.__name__} {number}",), daemon=True)
        for what in (operate, end)
        for number in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert overlaps == []
    assert not lock.is_busy


def test_an_operation_inside_of_an_operation_goes_on() -> None:
    """Autoflush and lazy loading call operations; only the outermost one releases the lock."""
    lock = ThreadLock("the database", None)
    assert lock.acquire()
    assert not lock.acquire()
    assert lock.is_busy
    lock.release()
    assert not lock.is_busy


def test_an_end_takes_over_what_its_own_thread_has_abandoned() -> None:
    """A signal handler may raise an exception between the operation and its release."""
    lock = ThreadLock("the database", None)
    lock.acquire()
    end = an_end()
    token = current_end.set(end)
    lock.acquire_for_end(end)
    assert lock.is_held_by_end_of_caller()
    lock.release()
    current_end.reset(token)
    assert not lock.is_busy


@pytest.mark.parametrize("ends", [True, False])
def test_nobody_waits_for_an_operation_that_another_task_has_abandoned(*, ends: bool) -> None:
    """The exception of a signal handler ends the task, or the task catches it and goes on."""

    class Stop(Exception):
        """Raised by a signal handler."""

    def operate(lock: TaskLock) -> None:
        lock.acquire()
        raise Stop

    async def main() -> None:
        lock = TaskLock("the database")

        async def child() -> None:
            try:
                await greenlet_spawn(operate, lock)
            except Stop:
                if not ends:
                    await asyncio.sleep(60)
                raise

        task = asyncio.create_task(child())
        await asyncio.sleep(0.01)
        await greenlet_spawn(lock.acquire)
        lock.release()
        await asyncio.wait_for(greenlet_spawn(lock.acquire_for_end, an_end()), 5)
        lock.release()
        assert not lock.is_busy
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())


def test_a_commit_of_several_steps_is_not_abandoned_between_them() -> None:
    """A session is flushed, then other sessions are flushed, and then it is committed."""

    async def main() -> None:
        lock = TaskLock("the database")
        first, second = an_end(), an_end()

        async def end_first() -> None:
            await greenlet_spawn(lock.acquire_for_end, first)
            await asyncio.sleep(0.1)
            assert not ending.done()
            lock.release()

        steps = asyncio.create_task(end_first())
        await asyncio.sleep(0.01)
        ending = asyncio.create_task(greenlet_spawn(lock.acquire_for_end, second))
        await steps
        await asyncio.wait_for(ending, 5)

    asyncio.run(main())


def test_a_commit_that_was_interrupted_on_the_event_loop_keeps_no_thread_waiting() -> None:
    """A session that has only read is committed there, and then closed in a worker thread."""
    lock = ThreadLock("the database", None)
    interrupted, last = an_end(), an_end()
    token = current_end.set(interrupted)
    lock.acquire_for_end(interrupted)
    current_end.reset(token)
    interrupted.failure = LookupError()
    with pytest.raises(ConcurrentUse):
        lock.acquire()

    def close() -> None:
        token = current_end.set(last)
        lock.acquire_for_end(last)
        lock.release(closed=True)
        current_end.reset(token)

    in_other_thread(close)
    assert not lock.is_busy


def test_a_failed_commit_keeps_the_lock_while_its_thread_is_at_work() -> None:
    """The exception of a signal handler reaches the event loop, and not the worker thread."""
    lock = ThreadLock("the database", None)
    failed = an_end()
    acquired, go_on = threading.Event(), threading.Event()

    def commit() -> None:
        current_end.set(failed)
        lock.acquire_for_end(failed)
        acquired.set()
        go_on.wait(10)
        lock.release()

    threading.Thread(target=commit, daemon=True).start()
    assert acquired.wait(10)
    failed.failure = LookupError()
    waits = threading.Thread(target=lock.acquire_for_end, args=(an_end(),), daemon=True)
    waits.start()
    waits.join(0.2)
    assert waits.is_alive()
    go_on.set()
    waits.join(10)
    assert not waits.is_alive()


def test_a_commit_that_was_interrupted_keeps_nobody_waiting() -> None:
    """A signal handler stops it before it releases the lock; the next one closes the session."""

    async def main() -> None:
        lock = TaskLock("the database")

        async def end(*, releases: bool) -> None:
            await greenlet_spawn(lock.acquire_for_end, an_end())
            await asyncio.sleep(0.01)
            if releases:
                lock.release()

        ending = asyncio.create_task(end(releases=False))
        await asyncio.sleep(0)
        waits = asyncio.create_task(greenlet_spawn(lock.acquire))
        await asyncio.wait([ending])
        await asyncio.wait_for(end(releases=True), 5)
        await asyncio.wait_for(waits, 5)
        lock.release()
        assert not lock.is_busy

    asyncio.run(main())


def test_an_end_does_not_take_over_what_another_thread_is_at() -> None:
    """The commit waits until the operation has ended, and uses no processor meanwhile."""
    lock = ThreadLock("the database", None)
    acquired, go_on = threading.Event(), threading.Event()
    used: list[float] = []

    def operate() -> None:
        lock.acquire()
        acquired.set()
        go_on.wait(10)
        lock.release()

    def wait() -> None:
        lock.acquire_for_end(an_end())
        used.append(time.thread_time())

    threading.Thread(target=operate, daemon=True).start()
    assert acquired.wait(10)
    waits = threading.Thread(target=wait, daemon=True)
    waits.start()
    waits.join(0.2)
    assert waits.is_alive()
    go_on.set()
    waits.join(10)
    assert not waits.is_alive()
    assert used[0] < 0.05


def test_listeners_of_one_end_may_use_its_other_sessions_in_any_thread() -> None:
    """A commit of several sessions runs in several threads, and must not wait for itself."""
    lock = ThreadLock("the database", None)
    end = an_end()

    def prepare() -> None:
        current_end.set(end)
        lock.acquire_for_end(end)

    in_other_thread(prepare)
    token = current_end.set(end)
    assert not lock.acquire()
    lock.release(closed=True)
    current_end.reset(token)
    with pytest.raises(SessionClosed):
        lock.acquire()


@pytest.mark.parametrize("kind", [ThreadLock, TaskLock])
def test_whoever_waits_for_an_end_is_told_when_it_closed_the_session(kind: Any) -> None:
    """Operations and commits are both refused."""

    async def main() -> None:
        lock: SessionLock = kind("the database", *([None] if kind is ThreadLock else []))
        lock.acquire_for_end(an_end())
        lock.release(closed=True)
        for late in (lock.acquire, lambda: lock.acquire_for_end(an_end())):
            with pytest.raises(SessionClosed):
                late()
        assert not lock.is_busy

    asyncio.run(main())


def test_a_thread_has_no_part_in_a_session_of_tasks() -> None:
    """The thread gets an error that names SyncDatabase, and nothing is changed."""

    async def main() -> None:
        lock = TaskLock("the database")
        with pytest.raises(ConfigurationError, match="SyncDatabase"):
            await asyncio.to_thread(lock.acquire)
        assert not lock.is_busy
        assert not lock.is_used

    asyncio.run(main())


def test_helper_tasks_do_not_pile_up() -> None:
    """A stream may use its session in a thousand tasks, one after the other."""

    async def main() -> None:
        lock = TaskLock("the database")

        async def use(*, fails: bool) -> None:
            lock.acquire()
            lock.release()
            if fails:
                raise LookupError

        for number in range(1000):
            await asyncio.gather(use(fails=number == 500), return_exceptions=True)
        assert len(lock.users) <= 1
        lock.sort_out_users()
        assert (lock.users, lock.has_finished_work, lock.has_failed_work) == (set(), True, True)

    asyncio.run(main())


def test_a_lock_is_busy_while_a_commit_is_about_to_acquire_it() -> None:
    """Otherwise a unit of work could close the session, and the commit would fail."""

    async def run() -> None:
        lock = TaskLock("the database")

        async def commit() -> None:
            await greenlet_spawn(lock.acquire_for_end, an_end())
            lock.release()

        lock.acquire()
        committing = asyncio.create_task(commit())
        await asyncio.sleep(0)
        lock.release()
        assert lock.is_busy
        await committing
        assert not lock.is_busy

    asyncio.run(run())


def test_a_cancelled_reservation_keeps_nobody_waiting_although_another_commit_came_first() -> None:
    """The operations of the session would wait for a commit that never runs."""
    lock = ThreadLock("the database", None)
    cancelled, other = an_end(), an_end()
    lock.reserve_for(cancelled)
    lock.acquire_for_end(other)
    lock.release()
    assert lock.is_busy
    lock.cancel_reservation(cancelled)
    assert not lock.is_busy


def test_a_change_in_a_thread_waits_for_the_commit() -> None:
    """An error of the change reaches its caller."""
    lock = ThreadLock("the database", None)
    lock.reserve_for(an_end())
    assert not lock.delay(lock.forget_users)
