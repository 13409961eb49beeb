"""Positions in PostgreSQL's write-ahead log (WAL): of servers, and of clients.

The position of a client says up to which change the client has seen the database.
"""

import re
from time import time
from typing import Any, NamedTuple
from zlib import crc32

from typing_extensions import override

# What a cookie says about a client: timeline, WAL position and cluster of PostgreSQL. After a read
# from a replica, the replica's name and the time of the read follow.
_TEXT = re.compile(
    r"([0-9a-f]{8})\.([0-9a-f]{16})\.([0-9a-f]{8})(?:\.([0-9a-f]{8})\.([0-9a-f]{1,10}))?"
)


class Position(NamedTuple):
    """How far a server has written or replayed the write-ahead log (WAL).

    Attributes:
        timeline: Greater after each promotion of a replica to primary.
        lsn: The number of the byte in the WAL (PostgreSQL's log sequence number).
        cluster: A checksum that is the same for a primary and its replicas.
    """

    timeline: int
    lsn: int
    cluster: str

    @override
    def __str__(self) -> str:
        # Write all numbers with a fixed count of digits. Then the greater of two strings is the
        # later position. The application's store (`PositionStore`) needs this: it compares strings.
        return f"{self.timeline:08x}.{self.lsn:016x}.{self.cluster}"

    def includes(self, other: "Position") -> bool:
        """Return True if a server at this position has all changes up to the position `other`."""
        return self[::2] == other[::2] and self.lsn >= other.lsn


class Seen:
    """Up to which WAL position one client has seen one database. The client never reads older data.

    A replica may have replayed more than its last known position. So after a read from a replica,
    the client reads only from this replica or the primary.

    Args:
        text: The string from the client's cookie, or from a store. None if there is no such string.

    Attributes:
        position: The WAL position that a replica must have replayed for this client.
        replica: The only replica from which the client may read. None if there is no such limit.
        users: The sessions of this client that are using the primary now. In place of each session,
            this set has its `Route` (the object that chooses the session's server).
    """

    __slots__ = ("_instead", "_since", "_told", "position", "replica", "users")

    def __init__(self, text: str | None = None) -> None:
        self.position: Position | None = None
        self.replica: str | None = None
        self.users: set[Any] = set()
        self._since = 0
        # None if this package knows up to which WAL position the client has seen the database.
        # Otherwise a string to store for the client instead of a position, such as "0". It is not a
        # valid position, so a request with this string in its cookie reads from the primary.
        self._instead: str | None = None
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
        """True if this package knows the WAL position up to which the client has seen the database.

        Also True if the client has seen nothing yet. If this is False, the client must read from
        the primary, which has all changes.
        """
        return self._instead is None

    @property
    def text(self) -> str | None:
        """The WAL position up to which the client has seen the database, as a string.

        The next request of the client gets this string from a cookie or a store. If the position is
        not known, the string makes this request read from the primary. None if the client has seen
        nothing yet.
        """
        if self._instead is not None:
            return self._instead
        if self.position is None:
            return None
        text = str(self.position)
        return text if self.replica is None else f"{text}.{self.replica}.{self._since:x}"

    @property
    def _unclear(self) -> str:
        """A string to store for the client if it is unknown which changes the client has seen.

        The string is the client's last known WAL position, and "?". It is not a valid position, so
        the client's next request reads from the primary. The application's store keeps the greatest
        string of each client, and "?" makes this string greater than the position alone.
        """
        return f"{self.position}?" if self.position is not None else "0"

    def news(self) -> str | None:
        """Return a string to send in the client's cookie, or to save in the application's store.

        The string has the WAL position up to which the client has seen the database. None if there
        is nothing to send or save: the cookie or the store has this string already, or the client
        has seen nothing yet.
        """
        # If a session of this client is using the primary now (`users`), return the string that
        # makes the next request read from the primary. The session may have committed already, and
        # the WAL position of its COMMIT is unknown until this package asks the primary.
        text = self._unclear if self.users else self.text
        if text == self._told:
            return None
        self._told = text
        return text

    def read_from_replica(self, name: str, position: Position, lifetime: float) -> None:
        """Record that the client has read from the replica `name`.

        `position` is the last known WAL position of the replica. If half of `lifetime` (in seconds)
        has passed since the last record, the client's position is stored again, before its cookie
        expires.
        """
        now = int(time())
        if self.replica not in (None, name):
            # The client has read from two replicas, and nobody knows which of them has replayed
            # more. So its next request must read from the primary.
            self._instead = self._unclear
        elif self.replica is None or not 0 <= now - self._since <= lifetime / 2:
            self.replica, self._since = name, now
            self.position = self.position or position

    def add(self, text: str | None) -> None:
        """Record that the client has also seen all changes up to another WAL position.

        From now on, the client needs the later of the two positions. If it is unknown which one is
        later, the client reads from the primary next. `text` comes from `Seen.text` in another
        process, for example in the web server that has sent a job to this worker.
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
            position: The WAL position of the primary after the client has used it. None if the
                primary did not answer.
        """
        self.replica, self._instead = None, None if position is not None else self._unclear
        self.position = position or self.position


def checksum(text: object) -> str:
    """Return the checksum of a value, converted to a string, as eight hexadecimal digits."""
    return f"{crc32(str(text).encode()):08x}"
