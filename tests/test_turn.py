"""Turns under real threads: nobody waits for ever, and nobody comes twice."""

import sys
import threading
from collections.abc import Iterator

import pytest

from asgi_dbsession import ConcurrentUse
from asgi_dbsession.turn import turn_between_threads


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
    turn = turn_between_threads("the database")
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


@pytest.mark.usefixtures("restless")
def test_one_operating_and_one_ending_thread_never_wait_for_each_other() -> None:
    """The release that an end waits for may come just before it begins to wait."""
    turn = turn_between_threads("the database")
    rounds = 30000

    def operate() -> None:
        for _ in range(rounds):
            turn.take()
            turn.give()

    def end() -> None:
        for _ in range(rounds):
            turn.take_to_end()
            turn.give()

    threads = [threading.Thread(target=what, daemon=True) for what in (operate, end)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
