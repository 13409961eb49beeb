"""The size of a measurement."""

from collections.abc import Iterable
from dataclasses import dataclass

from .tools import FEW, is_installed


@dataclass(frozen=True)
class Size:
    """The size of each part of a measurement.

    Attributes:
        rounds: How often it is each tool's turn with each kind of request.
        turn: Seconds that one turn takes, about.
        few: Whether only those tools are measured that need no installing.
        clients: How many at once, one after the other.
        load: Seconds of load, in each of so many `load_rounds`.
        load_rounds: How often it is each tool's turn with it.
        slow: Seconds of slow readers, after `coming` seconds in which they come and buffers fill.
        patience: Seconds that a listener, and one more client, waits for an answer.
        download: The most seconds that a slow download may take.
        listeners: How many listen.
        requests: How many in the long run.
        starts: How often each tool is started.
    """

    rounds: int = 200
    turn: float = 0.004
    few: bool = False
    clients: tuple[int, ...] = (1, 10, 100, 1000)
    load: float = 1.0
    load_rounds: int = 3
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
    load_rounds=2,
    coming=0,
    slow=1,
    patience=0.3,
    download=0.5,
    listeners=20,
    requests=300,
    starts=1,
)
