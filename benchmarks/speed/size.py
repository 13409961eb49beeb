"""The size of a measurement."""

from collections.abc import Iterable
from dataclasses import dataclass

from .tools import FEW, is_installed


@dataclass(frozen=True)
class Size:
    """The size of each part of a measurement.

    Attributes:
        rounds: How often each tool is measured with each kind of request.
        turn: Seconds for one tool in one round, approximately.
        few: True to measure only the tools that need no installation.
        clients: The numbers of parallel clients to measure, one after the other.
        load: Seconds of load in each of the `load_rounds`.
        load_rounds: How often each tool is measured with load.
        slow: Seconds with slow readers, after `coming` seconds in which they connect and buffers
            fill.
        patience: Seconds that a listener, and one more client, waits for an answer.
        download: The largest number of seconds for a slow download.
        listeners: The number of listeners.
        requests: The number of requests in the long run.
        starts: How often each tool is started.
    """

    rounds: int = 200
    turn: float = 0.004
    few: bool = False
    clients: tuple[int, ...] = (1, 10, 100, 1000)
    load: float = 1.0
    load_rounds: int = 5
    coming: int = 2
    slow: int = 4
    patience: float = 5
    download: float = 60
    listeners: int = 500
    requests: int = 100_000
    starts: int = 5

    def chosen(self, tools: Iterable[str]) -> list[str]:
        """Return the tools that are installed here."""
        return [tool for tool in tools if is_installed(tool) and (tool in FEW or not self.few)]


QUICK = Size(
    rounds=3,
    turn=0.001,
    few=True,
    clients=(1, 10),
    load=0.1,
    load_rounds=1,
    coming=0,
    slow=1,
    patience=0.3,
    download=0.5,
    listeners=20,
    requests=300,
    starts=1,
)
