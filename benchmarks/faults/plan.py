"""Plans the faults, the requests of clients, and their order from a random seed."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeAlias

from .client import Request
from .cluster import Cluster, in_thread
from .proxy import AFTER, BEFORE, Proxy
from .workers import Workers


@dataclass(frozen=True)
class Stage:
    """The parts that a fault can break."""

    cluster: Cluster
    proxy: Proxy
    workers: Workers


# The function returns how often the fault happened.
Strike: TypeAlias = Callable[[Stage, Random, float], Coroutine[Any, Any, int]]


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: The name in the tables.
        then: What the handlers of writes do after the write (see `benchmarks.peers.work`).
        change: A function that changes the request of a client.
        strike: A function that causes the fault for so many seconds.
        leaves_open: True if an error may answer a write that is stored: a request is cancelled, or
            a connection dies, between COMMIT and its answer.
        clients: The number of parallel clients.
        calm: The share of requests that are plain writes, which the fault does not affect.
    """

    name: str
    then: tuple[str, ...] = ("",)
    change: Callable[[Request, Random], Request] = lambda request, _: request
    strike: Strike | None = None
    leaves_open: bool = False
    clients: int = 8
    calm: float = 0.0


def faults_in_order(seed: int, rounds: float = 1) -> Iterator[Fault]:
    """Return all faults in random order, in each of so many rounds.

    The first period has no fault, to show that nothing else is wrong. The number of rounds does not
    depend on the time: a tool that leaks is slow, and would have fewer faults than the others.
    """
    order = Random(f"order {seed}")
    yield CALM
    done = 0
    while done < rounds:
        yield from order.sample(FAULTS, len(FAULTS))
        done += 1


def next_request(fault: Fault, number: int, random: Random) -> tuple[Request, bool]:
    """Return the next request of a client, its number, and if it is a write."""
    if fault.calm and random.random() < fault.calm:
        (kind,) = random.choices(("entries", "transfers"), (10, 6))
        return Request(f"/{kind}/{number}?then="), True
    kind = random.choices(("entries", "transfers", "/read", "/stream"), (10, 6, 1, 3))[0]
    if kind.startswith("/"):
        return fault.change(Request(kind, "GET"), random), False
    then = random.choice(fault.then).replace(" ", "%20")
    return fault.change(Request(f"/{kind}/{number}?then={then}"), random), True


def is_fault(fault: Fault, request: Request) -> bool:
    """Return True if this request itself is a fault, not only sent during one."""
    handler_fails = fault.then not in (CALM.then, _SLOW) and "then=" in request.path
    return request.is_given_up or (handler_fails and not request.path.endswith("then="))


def _vanish(request: Request, random: Random) -> Request:
    return replace(
        request, leave_after=random.uniform(0.0005, 0.06) if random.random() < 0.5 else None
    )


def _vanish_at_a_point(request: Request, random: Random) -> Request:
    # Handlers wait 0.05 s between two statements and COMMIT takes 0.1 s, so 0.03 s is within both.
    leaving = [replace(request, leave=leave) for leave in ("sending", "reading")]
    return random.choice([request, *leaving, replace(request, leave_after=0.03)])


def _cancel(request: Request, random: Random) -> Request:
    after = random.choice([random.uniform(0.0005, 0.02), random.uniform(0.02, 0.15)])
    return replace(request, cancel_after=after if random.random() < 0.7 else None)


async def _terminate_backends(stage: Stage, random: Random, seconds: float) -> int:
    terminated = 0
    async with asyncio.timeout(seconds + 10):
        for _ in range(int(seconds / 0.3) or 1):
            await asyncio.sleep(random.uniform(0.1, 0.3))
            backends = await stage.cluster.query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            terminated += len(backends)
    return terminated


async def _restart_database(stage: Stage, random: Random, seconds: float) -> int:
    await asyncio.sleep(random.uniform(0.2, 0.5) * seconds)
    await in_thread(stage.cluster.stop_hard)
    await asyncio.sleep(random.uniform(0.1, 0.5))
    await in_thread(stage.cluster.start)
    return 1


def _signal_worker(number: int) -> Strike:
    async def signal_worker(stage: Stage, random: Random, seconds: float) -> int:
        await asyncio.sleep(random.uniform(0.2, 0.5) * seconds)
        stage.workers.signal_one(number, random)
        return 1

    return signal_worker


async def _cut_in_commit(stage: Stage, random: Random, seconds: float) -> int:
    before = stage.proxy.cuts
    stage.proxy.cut = lambda: random.choice((BEFORE, AFTER)) if random.random() < 0.25 else None
    await asyncio.sleep(seconds)
    stage.proxy.cut = lambda: None
    return stage.proxy.cuts - before


CALM = Fault("no fault", then=("", "", "slow commit", "stream"))
_SLOW = ("", "wait", "slow commit", "stream")
FAULTS = (
    Fault("the handler refuses", then=("", "refuse")),
    Fault("the handler fails", then=("", "raise")),
    Fault("a swallowed error aborts the transaction", then=("", "swallow")),
    Fault("COMMIT fails", then=("", "failing commit")),
    Fault("COMMIT is slow", then=("", "slow commit"), clients=20),
    Fault("clients vanish at random", then=_SLOW, change=_vanish),
    Fault("clients vanish at chosen points", then=_SLOW, change=_vanish_at_a_point),
    Fault("requests are cancelled", then=_SLOW, change=_cancel, leaves_open=True),
    Fault("backends are terminated", then=_SLOW, strike=_terminate_backends, leaves_open=True),
    Fault("the database is stopped hard", then=_SLOW, strike=_restart_database, leaves_open=True),
    Fault("the pool is exhausted", then=("", "wait long"), clients=60),
    Fault("a worker is killed", then=_SLOW, strike=_signal_worker(signal.SIGKILL)),
    Fault("a worker is told to stop", then=_SLOW, strike=_signal_worker(signal.SIGTERM)),
    Fault("connections are cut in COMMIT", then=_SLOW, strike=_cut_in_commit, leaves_open=True),
)
