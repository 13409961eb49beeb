"""Turns under real threads: nobody waits for ever, and nobody comes twice."""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from asgi_dbsession import ConcurrentUse, SessionClosed
from asgi_dbsession.session.lock import BETWEEN_THREADS, Turn


@pytest.fixture
def restless() -> Iterator[None]:
    """Have threads change places as often as they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("restless")
def test_operations_and_ends_of_many_threads_follow_each_other() -> None:
    """An end and an operation wait for each other; two operations refuse each other."""
    turn = Turn("the database", *BETWEEN_THREADS)
    inside: list[str] = []
    overlaps: list[list[str]] = []
    rounds = 4000

    def check(who: str) -> None:
        inside.append(who)
        if len(inside) > 1:
            overlaps.append(list(inside))
        inside.remove(who)

    def operate(who: str) -> None:
        for _ in range(rounds):
            try:
                turn.take()
            except ConcurrentUse:
                continue
            check(who)
            turn.give()

    def end(who: str) -> None:
        for _ in range(rounds):
            turn.take_to_end()
            check(who)
            turn.give()

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
    assert not turn.is_busy


def test_an_end_that_is_over_between_two_questions_is_not_the_callers_own() -> None:
    """An operation that took it for that would begin without its turn."""
    answers: list[object] = ["end"] * 3

    class Fickle(Turn):
        @property
        def _ending(self) -> object:
            return answers.pop() if answers else None

        @_ending.setter
        def _ending(self, ending: object) -> None: ...

    turn = Fickle("the database", *BETWEEN_THREADS)
    assert turn.take()
    assert turn.is_busy
    turn.give()


@pytest.mark.parametrize("first", ["operation", "other end"])
def test_an_end_does_not_wait_for_a_release_that_it_has_just_missed(first: str) -> None:
    """What is in flight may be done between asking for the turn and waiting for it."""
    callers = [first]

    def never(released: Future[None]) -> None:
        raise AssertionError("nobody is left to wake it")

    class Unlucky(Turn):
        def _claim(self, caller: object, ending: object = None) -> bool:
            claimed = super()._claim(caller, ending)
            if not claimed and self._holder == first:
                self.give()
            return claimed

    turn = Unlucky("the database", lambda: callers[-1], never)
    if first == "operation":
        turn.take()
    else:
        turn.take_to_end()
    callers.append("end")
    turn.take_to_end()
    assert turn.is_ended_here()
    turn.give(over=True)
    with pytest.raises(SessionClosed):
        turn.take()


def test_a_thread_has_no_part_in_the_end_of_a_session_of_tasks() -> None:
    """It may come in the middle of one: it neither raises nor takes the turn and keeps it."""
    callers: list[object] = []

    def caller() -> object:
        if not callers:
            raise RuntimeError
        return callers[-1]

    def never(released: Future[None]) -> None:
        raise AssertionError("nobody is left to wake it")

    turn = Turn("the database", caller, never)
    assert not turn.take_to_end_if_free()
    callers.append("the end")
    turn.take_to_end()
    assert turn.is_ended_here()
    callers.clear()
    assert not turn.is_ended_here()
    turn.give(over=True)
