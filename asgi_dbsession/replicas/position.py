"""A position in the write-ahead log (WAL), and what a client has seen of it."""

import re
from time import time
from typing import Any, NamedTuple
from zlib import crc32

# Fixed widths, so that of two texts of one cluster the later position is the greater text.
_TEXT = re.compile(
    r"([0-9a-f]{8})\.([0-9a-f]{16})\.([0-9a-f]{8})(?:\.([0-9a-f]{8})\.([0-9a-f]{1,10}))?"
)
# What a client is given when the primary did not answer after COMMIT: it is no position.
_UNKNOWN = "unknown"


class Position(NamedTuple):
    """How far a server has written, or replayed, the WAL.

    Attributes:
        timeline: Grows with each promotion. A position says nothing about another timeline.
        lsn: The byte in the WAL.
        cluster: A checksum of the identifier that a primary shares with its replicas alone.
    """

    timeline: int
    lsn: int
    cluster: str

    def includes(self, other: "Position") -> bool:
        """Whether a server that is here has replayed all that `other` stands for."""
        return self[::2] == other[::2] and self.lsn >= other.lsn


class Seen:
    """What one client has seen of one database.

    A client that read from the primary has seen its position. A client that read from a replica may
    have seen more than any position tells, and so goes on with that replica.

    Args:
        text: What the client says it has seen. Anything but a position that `text` has made is not
            trusted, so that the client reads from the primary next.

    Attributes:
        position: What a server must have replayed.
        replica: The name of the replica that the client reads from.
        users: What uses the primary for this client now, or has used it and not asked for its
            position since.
    """

    __slots__ = ("_instead", "_since", "_told", "position", "replica", "users")

    def __init__(self, text: str | None = None) -> None:
        self.position: Position | None = None
        self.replica: str | None = None
        self.users: set[Any] = set()
        self._since = 0
        self._instead: str | None = None  # what the client has in place of a position
        self._told: str | None = text
        if text is not None:
            self._read(text)

    def _read(self, text: str) -> None:
        found = _TEXT.fullmatch(text)
        if found is None:
            self._instead = text
            return
        timeline, lsn, cluster, replica, since = found.groups()
        self.position = Position(int(timeline, 16), int(lsn, 16), cluster)
        self.replica, self._since = replica, int(since or "0", 16)

    @property
    def is_trusted(self) -> bool:
        """Whether a replica may be used, if it is far enough."""
        return self._instead is None

    @property
    def text(self) -> str | None:
        """What the client must say next time; None if it has seen nothing."""
        if self._instead is not None:
            return self._instead
        if self.position is None:
            return None
        timeline, lsn, cluster = self.position
        text = f"{timeline:08x}.{lsn:016x}.{cluster}"
        return text if self.replica is None else f"{text}.{self.replica}.{self._since:x}"

    def news(self) -> str | None:
        """What to tell the client; None if it knows already."""
        text = self.text
        if text == self._told:
            return None
        self._told = text
        return text

    def read_from_replica(self, name: str, position: Position, lifetime: float) -> None:
        """The client reads from a replica, which has replayed at least that position.

        Args:
            name: The name of the replica.
            position: Its position.
            lifetime: Seconds for which the client remembers. The name is told again after half of
                them, so that it is not forgotten while the client reads.
        """
        now = int(time())
        if self.replica not in (None, name):
            self._instead = _UNKNOWN  # of two replicas, nobody knows which one is further
        elif self.replica is None or not 0 <= now - self._since <= lifetime / 2:
            self.replica, self._since = name, now
            self.position = self.position or position

    def add(self, text: str | None) -> None:
        """The client has seen this too; text that cannot be compared is not trusted."""
        if text is None or not self.is_trusted:
            return
        other = Seen(text)
        if self.position is None or not other.is_trusted:
            self.position, self._instead = other.position, other._instead
            self.replica, self._since = other.replica, other._since
        elif other.position is None or other.replica not in (None, self.replica):
            self._instead = _UNKNOWN
        elif other.position.includes(self.position):
            self.position = other.position
        elif not self.position.includes(other.position):
            self._instead = _UNKNOWN

    def read_from_primary(self, position: Position | None) -> None:
        """The client has used the primary, which is at that position; None: it did not answer."""
        self.replica, self._instead = None, None if position is not None else _UNKNOWN
        self.position = position or self.position


def checksum(text: object) -> str:
    """Eight characters that stand for a text."""
    return f"{crc32(str(text).encode()):08x}"
