"""Overload: when 503 should begin, and what a storm of retries does."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from random import Random

from .model import Deployment, Kind, Model, Way
from .parts import Steps

# One statement of 8 ms: the two processors of the database answer 250 of them per second.
_KIND = Kind("a read", handle=0.0004, send=0.0002, statements=1, loop=0.0002, work=0.008)
_PROCESSORS, _WORKERS, _POOL, _NETWORK = 2, 3, 4, 0.0005
CONNECTIONS = _WORKERS * _POOL
CAPACITY = _PROCESSORS / _KIND.work
PATIENCE = 5.0  # seconds until a client asks again, or leaves
TRIES = 6


@dataclass(frozen=True)
class Pause:
    """How long a client waits before it tries again.

    Attributes:
        name: As the tables say it.
        least: Seconds.
        most: Seconds; in between by chance.
        doubles: Whether the second is twice as long after each try.
    """

    name: str
    least: float
    most: float
    doubles: bool = False

    def seconds(self, number: int, random: Random) -> float:
        """The pause after the try with that number, from 1 on."""
        most = self.most * 2 ** (number - 1) if self.doubles else self.most
        return random.uniform(self.least, most)


RETRIES = (
    Pause("after 0.1 s", 0.1, 0.1),
    Pause("after 2 s", 2.0, 2.0),
    Pause("after a random time of at most 2, 4, 8, … s", 0.0, 2.0, doubles=True),
)
# A browser's `EventSource` waits some seconds, unless the server has sent another number.
RECONNECTS = (
    Pause("at once", 0.0, 0.0),
    Pause("after 3 s", 3.0, 3.0),
    Pause("after a random time of 3 to 33 s", 3.0, 33.0),
)


@dataclass
class Crowd:
    """Clients of one application, and what happened to them.

    Args:
        pool_timeout: Seconds after which a request without a connection gets 503.
        seed: What all chance follows from.
        retry: The pause before the next try. None: a client tries once.

    Attributes:
        came: How many there were.
        answered: How many were answered in time.
        left: How many left without an answer.
        taken: Seconds from the first try to the answer.
        tries: Requests in each second.
        answers: Answers in time, in each second.
    """

    pool_timeout: float
    seed: int
    retry: Pause | None = None
    came: int = 0
    answered: int = 0
    left: int = 0
    taken: list[float] = field(default_factory=list)
    tries: Counter[int] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        deployment = Deployment(
            _WORKERS, _POOL, self.pool_timeout, processors=_PROCESSORS, network=_NETWORK
        )
        self.model = Model(deployment, Way.STATEMENTS, [_KIND], self.seed)
        self._env, self._random = self.model.env, Random(f"{self.seed} clients")

    def come(self, load: float) -> None:
        """Have clients come, so many as a share of those that the database can answer."""

        def come() -> Steps:
            while True:
                yield self._env.timeout(self._random.expovariate(load * CAPACITY))
                self._env.process(self._be_client())

        self._env.process(come())

    def stop_database(self, start: float, seconds: float) -> None:
        """Have the database do nothing for so many seconds."""

        def stop() -> Steps:
            yield self._env.timeout(start)
            self.model.database.stop(seconds)

        self._env.process(stop())

    def cut_off(self, start: float, listeners: int, pause: Pause) -> None:
        """Have so many listeners lose their connection, and come back after a pause."""

        def be_listener() -> Steps:
            yield self._env.timeout(start)
            for number in count(1):
                yield self._env.timeout(pause.seconds(number, self._random))
                if (yield from self._ask()):
                    return

        for _ in range(listeners):
            self._env.process(be_listener())

    def run(self, seconds: float) -> None:
        """Simulate."""
        self._env.run(until=seconds)

    def recovered(self, load: float, since: int, until: int) -> int | None:
        """Seconds after which there are no more tries than usual; None if they never are."""
        usual = load * CAPACITY
        for second in range(since, until - 5):
            if sum(self.tries[each] for each in range(second, second + 5)) < usual * 5 * 1.1:
                return second - since
        return None

    def _be_client(self) -> Steps:
        self.came += 1
        came = self._env.now
        for number in range(1, TRIES + 1 if self.retry else 2):
            if (yield from self._ask()):
                self.answered += 1
                self.taken.append(self._env.now - came)
                self.answers[int(self._env.now)] += 1
                return
            if self.retry:
                yield self._env.timeout(self.retry.seconds(number, self._random))
        self.left += 1

    def _ask(self) -> Steps:
        self.tries[int(self._env.now)] += 1
        answer = self._env.process(self.model.serve(*self.model.next()))
        yield answer | self._env.timeout(PATIENCE)
        return answer.processed and answer.value
