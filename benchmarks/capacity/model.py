"""Workers, their pools, PgBouncer and a database server, and what a request does with them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from random import Random

import simpy

from .parts import Connections, Gauge, Processors, Steps


class Way(Enum):
    """Until when a request holds its connection, from its first statement on."""

    UNTIL_READ = "until the client has read"
    UNTIL_COMMIT = "until COMMIT"
    STATEMENTS = "until COMMIT, reads without transaction"


@dataclass(frozen=True)
class Kind:
    """One kind of request; all times in seconds.

    Attributes:
        name: What it is called.
        handle: Of the event loop, before the first statement.
        send: Of the event loop, after the last.
        statements: How many.
        loop: Of the event loop, for each round trip to the database.
        work: Of a processor of the database, for each round trip.
        wait: What the first statement waits in the database without working.
        writes: Whether it needs a transaction in any case.
        reading: What the client takes to read the response.
        buffered: How much of that it reads from buffers, when the application has sent all.
        share: How many of all requests are of this kind.
    """

    name: str
    handle: float
    send: float
    statements: int
    loop: float
    work: float
    wait: float = 0.0
    writes: bool = False
    reading: float = 0.0
    buffered: float = 0.0
    share: float = 1.0


@dataclass(frozen=True)
class Deployment:
    """What there is of everything.

    Attributes:
        workers: Processes, each with an event loop and a pool.
        pool_size: Connections of each pool.
        pool_timeout: Seconds after which a request without a connection is refused (503).
        server_connections: Connections of PgBouncer to the server; infinite: there is none.
        processors: Of the database server.
        network: Seconds of a round trip between a worker and the database.
    """

    workers: int = 1
    pool_size: float = inf
    pool_timeout: float = inf
    server_connections: float = inf
    processors: int = 1
    network: float = 0.0


@dataclass
class Outcome:
    """What happened after the simulation had warmed up.

    Attributes:
        taken: Seconds that each answered request took until its last byte.
        waited: Seconds that each waited for a connection.
        refused: How many were not given a connection in time.
        in_pools: How many connections were out of the pools together.
        in_one_pool: For how many seconds how many were out of one pool, of all pools.
        on_server: How many connections of the server worked for somebody, behind PgBouncer.
        database: The share of time for which a processor of the database worked.
    """

    in_pools: Gauge
    on_server: Gauge
    taken: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    refused: int = 0
    in_one_pool: Counter[int] = field(default_factory=Counter)
    database: float = 0.0


class Model:
    """One application with one way to hold connections.

    Args:
        deployment: What it runs on.
        way: How it holds connections.
        kinds: What clients ask for.
        seed: What all chance follows from.
    """

    def __init__(
        self, deployment: Deployment, way: Way, kinds: Sequence[Kind], seed: int = 1
    ) -> None:
        self.env = env = simpy.Environment()
        self.outcome = Outcome(in_pools=Gauge(env), on_server=Gauge(env))
        self._deployment, self._way, self._kinds = deployment, way, kinds
        self._shares = [kind.share for kind in kinds]
        self._random = Random(seed)
        self.database = Processors(env, deployment.processors)
        self._gauges = [Gauge(env) for _ in range(deployment.workers)]
        self._loops = [Processors(env, 1) for _ in range(deployment.workers)]
        self._pools = [
            Connections(env, deployment.pool_size, self.outcome.in_pools, g) for g in self._gauges
        ]
        self._server = Connections(env, deployment.server_connections, self.outcome.on_server)

    def come(self, rate: float) -> None:
        """Have so many requests per second come, by chance, to workers by chance."""
        self.env.process(self._come(rate))

    def begin_within(self, rate: float) -> None:
        """Have those requests under way that long readings make last from before the beginning."""
        for kind in self._kinds:
            lasting = rate * kind.share / sum(self._shares) * kind.reading
            for _ in range(round(lasting)):
                self.env.process(self._read_on(self._random.random() * kind.reading))

    def stay(self, clients: int, pause: float) -> None:
        """Have so many clients ask again and again, with so many seconds in between."""
        for _ in range(clients):
            self.env.process(self._stay(pause))

    def run(self, warm_up: float, seconds: float) -> Outcome:
        """Simulate, and say what happened after the warm-up."""
        self.env.run(until=warm_up)
        outcome = self.outcome
        outcome.taken.clear()
        outcome.waited.clear()
        outcome.refused = 0
        worked = self.database.worked
        for gauge in (outcome.in_pools, outcome.on_server, *self._gauges):
            gauge.forget()
        self.env.run(until=warm_up + seconds)
        for gauge in self._gauges:
            outcome.in_one_pool.update(gauge.seconds)
        worked = self.database.worked - worked
        outcome.database = worked / seconds / self._deployment.processors
        return outcome

    def _come(self, rate: float) -> Steps:
        while True:
            yield self.env.timeout(self._random.expovariate(rate))
            self.env.process(self.serve(*self.next()))

    def _stay(self, pause: float) -> Steps:
        yield self.env.timeout(self._random.random() * pause)
        while True:
            yield self.env.process(self.serve(*self.next()))
            yield self.env.timeout(pause)

    def next(self) -> tuple[int, Kind]:
        """The worker that gets the next request, and what it asks for: by chance."""
        (kind,) = self._random.choices(self._kinds, self._shares)
        return self._random.randrange(len(self._loops)), kind

    def serve(self, worker: int, kind: Kind) -> Steps:
        """One request, until its client has read all; whether it was answered, or refused."""
        env, loop, pool = self.env, self._loops[worker], self._pools[worker]
        came = env.now
        yield loop.work(kind.handle)
        asked = env.now
        if not (yield from pool.acquire(self._deployment.pool_timeout)):
            self.outcome.refused += 1
            return False
        self.outcome.waited.append(env.now - asked)
        yield from self._query(loop, kind)
        if self._way is Way.UNTIL_READ:
            yield loop.work(kind.send)
            yield env.timeout(kind.reading - kind.buffered)
            self._server.release()
            pool.release()
            yield env.timeout(kind.buffered)
        else:
            pool.release()
            yield loop.work(kind.send)
            if kind.reading:
                yield env.timeout(kind.reading)
        self.outcome.taken.append(env.now - came)
        return True

    def _query(self, loop: Processors, kind: Kind) -> Steps:
        """All round trips. The connection of PgBouncer is held longer only `UNTIL_READ`."""
        in_transaction = kind.writes or self._way is not Way.STATEMENTS
        if in_transaction:
            yield from self._server.acquire()
            yield from self._round_trip(loop, kind)  # BEGIN
        for number in range(kind.statements):
            if not in_transaction:
                yield from self._server.acquire()
            yield from self._round_trip(loop, kind, kind.wait if number == 0 else 0.0)
            if not in_transaction:
                self._server.release()
        if in_transaction:
            yield from self._round_trip(loop, kind)  # COMMIT
            if self._way is not Way.UNTIL_READ:
                self._server.release()

    def _round_trip(self, loop: Processors, kind: Kind, wait: float = 0.0) -> Steps:
        yield loop.work(kind.loop)
        yield self.database.work(kind.work, self._deployment.network)
        if wait:
            yield self.env.timeout(wait)

    def _read_on(self, left: float) -> Steps:
        if self._way is Way.UNTIL_READ:
            pool = self._pools[self._random.randrange(len(self._pools))]
            yield from pool.acquire()
            yield from self._server.acquire()
            yield self.env.timeout(left)
            self._server.release()
            pool.release()
