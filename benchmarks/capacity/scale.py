"""How many connections each way of holding them needs, far beyond one machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, sqrt
from typing import Any

from benchmarks.speed.tools import OURS

from .model import Deployment, Kind, Model, Outcome, Way
from .parts import quantile

WORKERS, RATE = 1_000, 100_000  # requests per second
NETWORK = 0.0005  # seconds of a round trip within a data centre
_PROCESSORS = 128
ENOUGH = 0.999  # of the time
_FAST, _SLOW, _LISTENS = 0.005, 2.0, 60.0  # seconds that a client reads
FAST, SLOW, LISTENERS = (
    "all clients read in 5 ms",
    "one in ten reads for 2 s",
    "also, one in 1 000 listens for 60 s",
)
READERS = (FAST, SLOW, LISTENERS)


@dataclass(frozen=True)
class Need:
    """What one way of holding connections needs.

    Attributes:
        readers: How clients read.
        way: Until when a request holds its connection.
        mean: How many connections are out of all pools, on average.
        in_pool: How many are enough for one worker nearly always.
        in_pools: The same for all pools, if they were one.
        on_server: The same behind PgBouncer in transaction mode.
        waited: The seconds that nearly every request waits for a connection of such pools.
    """

    readers: str
    way: Way
    mean: float
    in_pool: int
    in_pools: int
    on_server: int
    waited: float

    @property
    def rule(self) -> int:
        """What the rule of thumb says of all pools together."""
        return rule(self.mean)


def rule(mean: float) -> int:
    """So many on average, and three times the root of it in reserve."""
    return ceil(mean + 3 * sqrt(mean))


def kinds(speed: Mapping[str, Any], readers: str) -> list[Kind]:
    """Reads and writes, with the times that `benchmarks.speed` has measured.

    Half of the time of a statement is taken to be the worker's, and half the database's.

    Args:
        speed: What is in `speed.json`.
        readers: How clients read.
    """
    alone = speed["in process"]["FastAPI"]
    idle = _microseconds(speed["over uvicorn"]["FastAPI"]["no database use"])
    ten, one = (_microseconds(alone[name]) for name in ("ten SELECTs", "one SELECT"))
    half = (ten - one) / 9 / 2
    read = Kind("a read", idle * 0.6, idle * 0.4, 2, half, half, share=0.9, reading=_FAST)
    write = replace(read, name="a write", statements=3, writes=True, share=0.1)
    if readers == FAST:
        return [read, write]
    found = []
    for kind in (read, write):
        found.append(replace(kind, share=kind.share * 0.9))
        found.append(replace(kind, share=kind.share * 0.1, reading=_SLOW))
    if readers == LISTENERS:
        found.append(replace(read, name="a stream", share=0.001, reading=_LISTENS))
    return found


def needs(
    speed: Mapping[str, Any], *, workers: int = WORKERS, rate: float = RATE, seed: int
) -> list[Need]:
    """All ways, for all kinds of readers.

    Args:
        speed: What is in `speed.json`.
        workers: How many processes.
        rate: Requests per second, of all of them.
        seed: What all chance follows from.
    """
    deployment = Deployment(workers, processors=_PROCESSORS, network=NETWORK)
    found = []
    for readers in READERS:
        asked = kinds(speed, readers)
        found += [
            _need(readers, way, partial(_run, way, asked, rate, seed), deployment) for way in Way
        ]
    return found


def _need(
    readers: str, way: Way, run: Callable[[Deployment], Outcome], deployment: Deployment
) -> Need:
    outcome = run(deployment)
    in_pool = quantile(outcome.in_one_pool, ENOUGH)
    on_server = quantile(outcome.on_server.seconds, ENOUGH)
    bounded = replace(deployment, pool_size=in_pool, server_connections=on_server)
    waited = sorted(run(bounded).waited)
    return Need(
        readers,
        way,
        mean=outcome.in_pools.mean,
        in_pool=in_pool,
        in_pools=quantile(outcome.in_pools.seconds, ENOUGH),
        on_server=on_server,
        waited=waited[int(len(waited) * ENOUGH)],
    )


def _run(way: Way, asked: list[Kind], rate: float, seed: int, deployment: Deployment) -> Outcome:
    model = Model(deployment, way, asked, seed)
    model.begin_within(rate)
    model.come(rate)
    return model.run(warm_up=0.1, seconds=0.4)


def _microseconds(figures: Mapping[str, Any]) -> float:
    return float(figures[OURS]["taken"][1]) / 1e6
