"""Runs this package under all faults again and again, until enough writes are acknowledged."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from .client import ask_door
from .cluster import Cluster
from .plan import CALM, Fault, Stage, faults_in_order
from .run import Result, merge, merge_by_fault, stage_for, take_turns

TOOL = "asgi_dbsession"
# Most writes are plain, so that most of them are acknowledged; every sixth request is a fault.
_CALM, _CLIENTS = 0.6, 12


@dataclass(frozen=True)
class Usage:
    """The resources that one worker process uses.

    Attributes:
        acknowledged: The number of writes that all workers had acknowledged at this time.
        pid: The process id.
        memory: The resident memory, in MB.
        descriptors: The number of open file descriptors.
        tasks: The number of asyncio tasks.
        connections: The number of connections in the pool.
    """

    acknowledged: int
    pid: int
    memory: float
    descriptors: int
    tasks: int
    connections: int


@dataclass(frozen=True)
class Soak:
    """The results with one driver.

    Attributes:
        driver: The name of the driver.
        seconds: The duration of the test.
        results: One result for each fault.
        usage: The resources of the worker that is never killed: after the first fault, in between,
            and after the last.
    """

    driver: str
    seconds: float
    results: list[Result]
    usage: list[Usage]

    @property
    def whole(self) -> Result:
        """Return the sum of all faults."""
        return merge(self.results)


async def soak(
    driver: str, cluster: Cluster, *, seed: int, seconds: float, writes: int, faults: int
) -> Soak:
    """Run all faults until enough writes were acknowledged and enough faults happened.

    Args:
        driver: The driver of the database URL.
        cluster: The database.
        seed: The seed of all random choices.
        seconds: The duration of each fault.
        writes: How many acknowledged writes are enough.
        faults: How many faults are enough.
    """
    start, results, usage = time.monotonic(), list[Result](), list[Usage]()
    acknowledged = struck = 0

    def until_enough() -> Iterator[Fault]:
        for fault in faults_in_order(seed, inf):
            if acknowledged >= writes and struck >= faults:
                yield CALM  # so that the last measurement is like the first one
                return
            yield replace(fault, calm=_CALM, clients=max(_CLIENTS, fault.clients))

    async with stage_for(TOOL, cluster, driver, spared=1) as stage:
        async for result in take_turns(stage, until_enough(), seed=seed, seconds=seconds):
            results.append(result)
            acknowledged += len(result.ledger.acknowledged)
            struck += result.faults
            if result.fault == CALM.name or len(results) % 15 == 1:
                usage.append(await _look(stage, acknowledged))
            _tell(driver, time.monotonic() - start, result, acknowledged, struck)
    return Soak(driver, time.monotonic() - start, merge_by_fault(results), usage)


async def _look(stage: Stage, acknowledged: int) -> Usage:
    answer: Any = await ask_door(stage.workers.ports[0], "/usage")
    return Usage(acknowledged, **answer)


def _tell(driver: str, seconds: float, result: Result, acknowledged: int, struck: int) -> None:
    words = ", ".join(result.complaints) or "fine"
    counts = f"{acknowledged} acknowledged, {struck} faults"
    print(f"{driver}, {seconds:.0f} s: {counts}; {result.fault}: {words}", flush=True)
