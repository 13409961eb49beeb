"""Runs one tool through the plan: clients write, faults happen, and the results are compared."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import astuple, dataclass
from itertools import count
from random import Random

from .client import Request, ask, held
from .cluster import Cluster, in_thread
from .ledger import SCHEMA, Finding, Ledger, begin_anew, compare, open_transactions
from .plan import Fault, Stage, is_fault, next_request
from .proxy import Proxy
from .workers import Workers

_MOST_REQUESTS = 20_000  # seconds within one fault
_PATIENCE = 20.0  # seconds


@dataclass(frozen=True)
class Result:
    """The results of a tool with one fault.

    Attributes:
        fault: The name of the fault.
        faults: The number of faults, including requests that are faults themselves.
        ledger: The answers to the clients.
        finding: The rows that were found in the database.
        held: The number of connections that were still checked out afterwards.
        open: The number of transactions that were still open on the server afterwards.
        recovered: Seconds until every worker stored rows again after the clients had left; None if
            a worker never did.
    """

    fault: str
    faults: int
    ledger: Ledger
    finding: Finding
    held: int
    open: int
    recovered: float | None

    @property
    def complaints(self) -> list[str]:
        """Return the errors in words; an empty list is good."""
        finding = self.finding
        amounts = {
            "lost": finding.lost,
            "twice": finding.twice,
            "phantom": finding.phantom,
            "half": finding.half,
            "money": finding.money,
            "leaked": self.held + self.open,
        }
        words = [f"{amount} {name}" for name, amount in amounts.items() if amount]
        return words if self.recovered is not None else [*words, "not recovered"]


def merge(results: Sequence[Result]) -> Result:
    """Return the sum of several rounds with one fault; the slowest recovery counts."""
    findings = [result.finding for result in results]
    slowest = [result.recovered for result in results]
    return Result(
        results[0].fault,
        sum(result.faults for result in results),
        Ledger(
            acknowledged=set().union(*(result.ledger.acknowledged for result in results)),
            refused=set().union(*(result.ledger.refused for result in results)),
            open=set().union(*(result.ledger.open for result in results)),
            requests=sum(result.ledger.requests for result in results),
        ),
        Finding(*(sum(column) for column in zip(*map(astuple, findings), strict=True))),
        sum(result.held for result in results),
        sum(result.open for result in results),
        None if None in slowest else max(each for each in slowest if each is not None),
    )


@asynccontextmanager
async def stage_for(
    tool: str, cluster: Cluster, driver: str, spared: int = 0
) -> AsyncIterator[Stage]:
    """Runs the tool's application in its workers, with a proxy in front of the database."""
    proxy = Proxy(cluster.port)
    workers = Workers(tool, cluster.url(driver, await proxy.start()), spared=spared)
    await workers.start()
    try:
        yield Stage(cluster, proxy, workers)
    finally:
        await workers.stop()
        proxy.stop()


@asynccontextmanager
async def running_cluster() -> AsyncIterator[Cluster]:
    """A temporary database server with the tables of the ledger."""
    cluster = await asyncio.to_thread(Cluster)
    try:
        await in_thread(cluster.start)
        await cluster.query(SCHEMA)
        yield cluster
    finally:
        await in_thread(cluster.remove)


async def run_tool(
    tool: str,
    faults: Iterable[Fault],
    *,
    seed: int,
    seconds: float,
    cluster: Cluster,
    driver: str = "asyncpg",
) -> list[Result]:
    """Run a tool with each fault for so many seconds, and return one result for each fault."""
    async with stage_for(tool, cluster, driver) as stage:
        turns = take_turns(stage, faults, seed=seed, seconds=seconds)
        return merge_by_fault([result async for result in turns])


async def take_turns(
    stage: Stage, faults: Iterable[Fault], *, seed: int, seconds: float
) -> AsyncIterator[Result]:
    """Run each fault on the stage for so many seconds."""
    numbers = count(1)
    left_over = False
    for turn, fault in enumerate(faults):
        if left_over:  # the results of one fault must not count for the next
            await stage.workers.stop()
            await stage.workers.start()
        await begin_anew(stage.cluster)
        random = Random(f"{seed} {turn} {fault.name}")
        result = await _run_fault(stage, fault, numbers, random, seconds)
        left_over = bool(result.complaints)
        yield result


def merge_by_fault(results: Iterable[Result]) -> list[Result]:
    """Return one result for each fault."""
    by_fault: dict[str, list[Result]] = {}
    for result in results:
        by_fault.setdefault(result.fault, []).append(result)
    return [merge(rounds) for rounds in by_fault.values()]


async def _run_fault(
    stage: Stage, fault: Fault, numbers: Iterator[int], random: Random, seconds: float
) -> Result:
    ledger, faults = Ledger(), 0
    end = time.monotonic() + seconds
    seeds = [random.random() for _ in range(fault.clients)]

    async def be_client(own: Random) -> None:
        nonlocal faults
        while time.monotonic() < end and ledger.requests < _MOST_REQUESTS:
            ledger.requests += 1
            number = next(numbers)
            request, is_write = next_request(fault, number, own)
            faults += is_fault(fault, request)
            status = await ask(own.choice(stage.workers.ports), request)
            if is_write:
                ledger.note(number, status, errors_leave_open=fault.leaves_open)
            if not status:
                await asyncio.sleep(0.02)

    async with asyncio.TaskGroup() as group:
        for seed in seeds:
            group.create_task(be_client(Random(seed)))
        strike = fault.strike and group.create_task(fault.strike(stage, random, seconds))
    faults += strike.result() if strike else 0
    recovered = await _recover(stage, fault, ledger, numbers)
    still_held, still_open = await _settle(stage)
    finding = await compare(ledger, stage.cluster)
    return Result(fault.name, faults, ledger, finding, still_held, still_open, recovered)


async def _recover(
    stage: Stage, fault: Fault, ledger: Ledger, numbers: Iterator[int]
) -> float | None:
    start = time.monotonic()
    for port in stage.workers.ports:
        status = None
        while status != 201:
            if time.monotonic() - start > _PATIENCE:
                return None
            number = next(numbers)
            status = await ask(port, Request(f"/entries/{number}"))
            ledger.note(number, status, errors_leave_open=fault.leaves_open)
            await asyncio.sleep(0.02)
    return time.monotonic() - start


async def _settle(stage: Stage) -> tuple[int, int]:
    """Wait until no connection and no transaction is open, and return how many still are."""
    still_held = still_open = 1
    with suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE / 4):
            while still_held or still_open:
                still_held = sum([await held(port) or 0 for port in stage.workers.ports])
                still_open = await open_transactions(stage.cluster)
                await asyncio.sleep(0.02)
    return still_held, still_open
