"""What the lag of replicas costs: reads on the primary, stale reads, steps back in time."""

from dataclasses import dataclass
from enum import Enum
from math import inf
from random import Random

import simpy

from .parts import Steps

# Replicas differ: these are their parts of the lag.
_REPLICAS = (0.8, 1.0, 1.2)
_WRITES, _STICKY = 0.1, 2.0  # share of requests; seconds


class Routing(Enum):
    """Which server answers a read."""

    NAIVE = "any"
    STICKY = "sticky"
    POSITIONS = "positions"


@dataclass
class Reads:
    """What became of the reads.

    Attributes:
        count: How many there were.
        on_primary: How many the primary answered.
        stale: How many did not show the client's own last write.
        back: How many showed an older state than the client had seen.
    """

    count: int = 0
    on_primary: int = 0
    stale: int = 0
    back: int = 0


class _Client:
    """What a server must know of one client. A position is the time of the last replayed COMMIT."""

    def __init__(self) -> None:
        self.written = self.seen = -inf
        self.needed = -inf  # with positions
        self.replica: int | None = None  # with positions: the one that it reads from


def simulate(
    routing: Routing, lag: float, gap: float, *, clients: int, seconds: float, seed: int
) -> Reads:
    """Have clients write and read.

    Args:
        routing: Which server answers a read.
        lag: Seconds, on average of the replicas.
        gap: Seconds between two requests of one client, on average.
        clients: How many.
        seconds: How long. What happens in the first tenth does not count.
        seed: What all chance follows from.
    """
    env, reads, random = simpy.Environment(), Reads(), Random(seed)
    positions = [lag * part for part in _REPLICAS]

    def be_client() -> Steps:
        client = _Client()
        while True:
            yield env.timeout(random.expovariate(1 / gap))
            if random.random() < _WRITES:
                client.written = client.seen = client.needed = env.now
                client.replica = None
            else:
                server = _choose(routing, client, env.now, positions, random)
                _read(client, server, env.now, positions, reads if env.now > seconds / 10 else None)

    for _ in range(clients):
        env.process(be_client())
    env.run(until=seconds)
    return reads


def _choose(
    routing: Routing, client: _Client, now: float, lags: list[float], random: Random
) -> int | None:
    """The number of a replica; None is the primary."""
    if routing is Routing.NAIVE:
        return random.randrange(len(lags))
    if routing is Routing.STICKY:
        return None if now - client.written < _STICKY else random.randrange(len(lags))
    allowed = range(len(lags)) if client.replica is None else [client.replica]
    far_enough = [each for each in allowed if now - lags[each] >= client.needed]
    client.replica = random.choice(far_enough) if far_enough else None
    if client.replica is None:
        client.needed = now  # it sees what the primary has
    return client.replica


def _read(
    client: _Client, server: int | None, now: float, lags: list[float], reads: Reads | None
) -> None:
    position = now if server is None else now - lags[server]
    if reads is not None:
        reads.count += 1
        reads.on_primary += server is None
        reads.stale += position < client.written
        reads.back += position < client.seen
    client.seen = max(client.seen, position)
