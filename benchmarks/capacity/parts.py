"""What the model is built from: processors, connections, and a gauge of how many are in use."""

from collections import defaultdict, deque
from collections.abc import Generator, Mapping
from heapq import heapify, heapreplace
from math import inf
from typing import Any, TypeAlias

import simpy

# What a process of simpy waits for, one event after the other.
Steps: TypeAlias = Generator[simpy.Event, Any, Any]


class Processors:
    """So many processors with one queue, first come, first served.

    How long a piece of work takes is known when it arrives, so its end can be calculated at once.
    That is exact, and takes one event instead of three.

    Args:
        env: The simulation.
        count: How many.
    """

    def __init__(self, env: simpy.Environment, count: int) -> None:
        self._env = env
        self._free_at = [0.0] * count
        heapify(self._free_at)
        self.worked = 0.0  # seconds

    def work(self, seconds: float, network: float = 0.0) -> simpy.Event:
        """The event of the end of so much work.

        Args:
            seconds: How long it takes one processor.
            network: Seconds of a round trip, half before the work and half after it. It must be
                the same for all who use these processors.
        """
        arrival = self._env.now + network / 2
        end = max(arrival, self._free_at[0]) + seconds
        heapreplace(self._free_at, end)
        self.worked += seconds
        return self._env.timeout(end + network / 2 - self._env.now)

    def stop(self, seconds: float) -> None:
        """Have them do nothing for so many seconds, from now on."""
        self._free_at = [max(each, self._env.now) + seconds for each in self._free_at]


class Gauge:
    """How many of something are in use, and for how long it was so many."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._since = 0.0
        self._seconds: defaultdict[int, float] = defaultdict(float)
        self.now = 0

    def add(self, count: int) -> None:
        """So many more are in use; fewer, if negative."""
        self._seconds[self.now] += self._env.now - self._since
        self._since = self._env.now
        self.now += count

    def forget(self) -> None:
        """Begin to measure."""
        self._seconds.clear()
        self._since = self._env.now

    @property
    def mean(self) -> float:
        """How many on average."""
        self.add(0)
        total = sum(self._seconds.values())
        return sum(level * seconds for level, seconds in self._seconds.items()) / (total or 1)

    @property
    def seconds(self) -> Mapping[int, float]:
        """For how many seconds there were how many in use."""
        self.add(0)
        return self._seconds


def quantile(seconds: Mapping[int, float], share: float) -> int:
    """The number that was not exceeded in this share of the time."""
    left = share * sum(seconds.values())
    for level in sorted(seconds):
        left -= seconds[level]
        if left <= 1e-12:
            return level
    return max(seconds, default=0)


class Connections:
    """A pool, or the server side of PgBouncer: so many connections, first come, first served.

    Args:
        env: The simulation.
        size: How many there are; infinite: as many as are asked for.
        gauges: Count the connections that are in use.
    """

    def __init__(self, env: simpy.Environment, size: float, *gauges: Gauge) -> None:
        self._env = env
        self._free = size
        self._waiting: deque[simpy.Event] = deque()
        self._gauges = gauges

    def acquire(self, patience: float = inf) -> Steps:
        """Wait for a connection; whether there was one within so many seconds."""
        if self._free > 0:
            self._free -= 1
        else:
            turn = self._env.event()
            self._waiting.append(turn)
            if patience < inf:
                self._env.timeout(patience).callbacks.append(lambda _: _give_up(turn))
            if not (yield turn):
                return False
        for gauge in self._gauges:
            gauge.add(1)
        return True

    def release(self) -> None:
        """Give a connection back, to who waits longest."""
        for gauge in self._gauges:
            gauge.add(-1)
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.triggered:
                turn.succeed(value=True)
                return
        self._free += 1


def _give_up(turn: simpy.Event) -> None:
    if not turn.triggered:
        turn.succeed(value=False)
