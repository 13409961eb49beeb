"""What the model predicts for this machine, beside what was measured on it.

What a request takes of the processor depends on how many are under way. `_in_a_crowd` calculates
how, from measurements with a pool that is not among those that are predicted.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from .measure import HELD, LARGE, NOTHING, READ, WAIT
from .model import Deployment, Kind, Model, Way

_WAIT = 0.5  # seconds of that query
_READING = 4.0  # seconds of a download of 400 kB at 100 kB per second
_SAVED = 3  # round trips of a transaction's three statements, without BEGIN and COMMIT
GOOD = 0.15


class Cell(NamedTuple):
    """One prediction.

    Attributes:
        request: What was asked for.
        pool: Connections of the pool.
        clients: How many asked.
        measured: Responses per second.
        predicted: The same, simulated.
    """

    request: str
    pool: int
    clients: int
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """The difference, as a share of what was measured."""
        return self.predicted / self.measured - 1 if self.measured else float("inf")

    @property
    def is_good(self) -> bool:
        """Whether the prediction is near enough."""
        return abs(self.error) <= GOOD


def predicted(found: Mapping[str, Any], seed: int, *, quick: bool = False) -> list[Cell]:
    """All that was measured with many clients, predicted from what was measured with one."""
    short = 0.1 if quick else 1.0
    alone, share = found["alone"], processor_share(found)
    cells = []
    for cell in found["responses"]:
        kind = kind_of(alone, cell["request"], share)
        kind = _in_a_crowd(kind, found["in_a_crowd"], cell["clients"], cell["pool"])
        long = (40 if cell["request"] == WAIT else 2) * short
        pause = alone[cell["request"]]["client"]
        model = Model(Deployment(pool_size=cell["pool"]), Way.STATEMENTS, [kind], seed)
        rate = _rate(model, cell["clients"], pause, long)
        cells.append(Cell(cell["request"], cell["pool"], cell["clients"], cell["measured"], rate))
    for cell in found["downloads"]:
        kind = _download(alone, share, found["held"][cell["tool"]])
        way = Way.UNTIL_READ if cell["tool"] == HELD else Way.STATEMENTS
        model = Model(Deployment(pool_size=cell["pool"]), way, [kind], seed)
        rate = _rate(model, cell["clients"], 0.0, 120 * short)
        name = f"a slow download, held {way.value}"
        cells.append(Cell(name, cell["pool"], cell["clients"], cell["measured"], rate))
    return cells


def processor_share(found: Mapping[str, Any]) -> float:
    """Of how much of a processor the server was left, when it could have used all of one."""
    busy = [
        cell["processor"]
        for cell in found["responses"]
        if cell["request"] == READ and cell["clients"] in (10, 100)
    ]
    return min(1.0, max(busy))


def kind_of(alone: Mapping[str, Any], name: str, share: float) -> Kind:
    """A request, from what one took alone.

    Args:
        alone: What each kind took, in seconds.
        name: Of the kind.
        share: Of a processor that the server had.
    """
    idle, one = alone[NOTHING]["server"] / share, alone[name]
    waits = name == WAIT
    trips = _SAVED + 2 if waits else 1
    loop = max(one["server"] / share - idle, 0) / trips
    wait = _WAIT if waits else 0.0
    work = max(one["taken"] - wait - one["server"] - one["client"], 0) / trips
    statements = _SAVED if waits else 1
    return Kind(name, idle * 0.6, idle * 0.4, statements, loop, work, wait, writes=waits)


def _in_a_crowd(
    kind: Kind, crowd: Mapping[str, Mapping[str, float]], clients: int, pool: int
) -> Kind:
    """Return the request with its times for so many clients and connections.

    An event loop that finds several events asks the system for all of them at once. So the fixed
    time of one turn is shared by as many statements as are under way. If many clients wait, each
    statement takes longer the more connections are at work: they, the event loop and the clients
    share the caches of two processors. By how much, is measured with a pool of `LARGE` connections,
    and taken in proportion.
    """
    without = {int(each): taken for each, taken in crowd[NOTHING].items()}
    statement = {int(each): taken - without[int(each)] for each, taken in crowd[READ].items()}
    turn = (statement[1] - statement[10]) / (1 - 1 / 10)
    together = statement[1] - turn + turn / min(clients, pool)
    growth = max(statement[clients] / statement[10], 1) if clients > 10 else 1
    growth = 1 + (growth - 1) * pool / LARGE
    requests = without[clients] / without[1]
    return replace(
        kind,
        handle=kind.handle * requests,
        send=kind.send * requests,
        loop=kind.loop * growth * together / statement[1],
    )


def _download(alone: Mapping[str, Any], share: float, held: float) -> Kind:
    read = kind_of(alone, READ, share)
    buffered = max(_READING - held, 0.0)
    return Kind(
        "a slow download",
        read.handle,
        read.send,
        read.statements,
        read.loop,
        read.work,
        reading=_READING,
        buffered=buffered,
    )


def _rate(model: Model, clients: int, pause: float, seconds: float) -> float:
    model.stay(clients, pause)
    return len(model.run(seconds / 4, seconds).taken) / seconds
