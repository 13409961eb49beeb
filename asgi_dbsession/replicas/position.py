"""A position in the write-ahead log (WAL) of PostgreSQL, and which positions a client has seen."""

import re
from time import time
from typing import Any, NamedTuple
from zlib import crc32

from typing_extensions import override

# A `Seen` as a string: timeline, WAL position and cluster; after a read from a replica, also the
# replica's name and the time at which both were stored. Timeline and WAL position have fixed
# widths, so in one cluster the strings sort in the same order as the positions.
_TEXT = re.compile(
    r"([0-9a-f]{8})\.([0-9a-f]{16})\.([0-9a-f]{8})(?:\.([0-9a-f]{8})\.([0-9a-f]{1,10}))?"
)


class Position(NamedTuple):
    """The position in the write-ahead log (WAL) up to which a server has written or replayed it.

    Attributes:
        timeline: A number that grows when a replica is promoted to primary. Positions of two
            timelines cannot be compared.
        lsn: The number of the byte in the WAL.
        cluster: A checksum of the system identifier, which a primary and its replicas share.
    """

    timeline: int
    lsn: int
    cluster: str

    @override
    def __str__(self) -> str:
        return f"{self.timeline:08x}.{self.lsn:016x}.{self.cluster}"

    def includes(self, other: "Position") -> bool:
        """Return True if a server at this position has replayed all changes up to `other`."""
        return self[::2] == other[::2] and self.lsn >= other.lsn


class Seen:
    """What one client has seen of one database, so that the client never reads an older state.

    After work on the primary, the client has seen the WAL up to the position of the primary. After
    a read from a replica, the client may have seen more than the last known position of this
    replica. So the client reads from the same replica, or from the primary.

    Args:
        text: The text that the client sent, or that a store returned; None without a text. If this
            class cannot read the text, the client reads from the primary next.

    Attributes:
        position: The WAL position that a replica must have replayed before the client reads there.
        replica: The name of the only replica that the client may read from; None for any replica.
        users: The `Route` of each session of this client that uses the primary, or has used the
            primary and not asked for its WAL position yet.
    """

    __slots__ = ("_instead", "_since", "_told", "position", "replica", "users")

    def __init__(self, text: str | None = None) -> None:
        self.position: Position | None = None
        self.replica: str | None = None
        self.users: set[Any] = set()
        self._since = 0
        self._instead: str | None = None  # the text to send if the position is unknown
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
        """False if the client must read from the primary, because nobody knows what it has seen."""
        return self._instead is None

    @property
    def text(self) -> str | None:
        """The text for the client's next request; None if the client has seen nothing."""
        if self._instead is not None:
            return self._instead
        if self.position is None:
            return None
        text = str(self.position)
        return text if self.replica is None else f"{text}.{self.replica}.{self._since:x}"

    @property
    def _unclear(self) -> str:
        """A text that is not a position, so that the client reads from the primary next.

        The text of each later position is greater. So a store replaces this text when the position
        is known again.
        """
        return f"{self.position}?" if self.position is not None else "0"

    def news(self) -> str | None:
        """Return the text to send to the client; None if the client already has this text."""
        # Another session of the client may have committed on the primary, and may not have asked
        # for the WAL position yet.
        text = self._unclear if self.users else self.text
        if text == self._told:
            return None
        self._told = text
        return text

    def read_from_replica(self, name: str, position: Position, lifetime: float) -> None:
        """Record that the client reads from a replica.

        Args:
            name: The name of the replica.
            position: A WAL position that the replica has replayed.
            lifetime: How long the client stores its text, in seconds. After half of this time, the
                text is sent again, so that the text does not expire while the client reads.
        """
        now = int(time())
        if self.replica not in (None, name):
            # The client has read from two replicas, and nobody knows which replica has replayed
            # more. So the client must read from the primary next.
            self._instead = self._unclear
        elif self.replica is None or not 0 <= now - self._since <= lifetime / 2:
            self.replica, self._since = name, now
            self.position = self.position or position

    def add(self, text: str | None) -> None:
        """Record what the client has seen in another process, for example.

        If the two positions cannot be compared, the client reads from the primary next.
        """
        if text is None or not self.is_trusted:
            return
        other = Seen(text)
        if self.position is None or not other.is_trusted:
            self.position = other.position or self.position
            self._instead = None if other.is_trusted else self._unclear
            self.replica, self._since = other.replica, other._since
        elif other.position is None or other.replica not in (None, self.replica):
            self._instead = self._unclear
        elif other.position.includes(self.position):
            self.position = other.position
        elif not self.position.includes(other.position):
            self._instead = self._unclear

    def read_from_primary(self, position: Position | None) -> None:
        """Record that the client has used the primary.

        Args:
            position: The WAL position of the primary after this use; None if it is unknown.
        """
        self.replica, self._instead = None, None if position is not None else self._unclear
        self.position = position or self.position


def checksum(text: object) -> str:
    """Return a checksum of a text, in eight characters."""
    return f"{crc32(str(text).encode()):08x}"
