"""The SQL statement that asks a server for its WAL position, and the answer."""

from typing import Any, NamedTuple

from .position import Position, checksum

# A replica shows the timeline that it receives only to roles with `pg_read_all_stats`. Other roles
# see the timeline of the last restart point, which follows a promotion some minutes later.
QUESTION = """
SELECT standby,
       CAST(CASE WHEN standby THEN pg_last_wal_replay_lsn()
                 ELSE pg_current_wal_insert_lsn() END AS text),
       CASE WHEN standby THEN coalesce((SELECT received_tli FROM pg_stat_wal_receiver),
                                       (SELECT timeline_id FROM pg_control_checkpoint()))
            ELSE CAST(CAST('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)
                      AS bit(32)) AS integer) END
FROM (SELECT pg_is_in_recovery() AS standby OFFSET 0) AS server
"""

# Asked once for each connection, because the server reads a file to answer.
IDENTITY = """
SELECT system_identifier, CAST(current_setting('wal_block_size') AS integer)
FROM pg_control_system()
"""
# Where a connection keeps the answer.
KEY = "asgi_dbsession.identity"

# The number of bytes in the header of each WAL page.
_PAGE_HEADER = 24


class Answer(NamedTuple):
    """The WAL position of a server at one time.

    Attributes:
        asked: The time of the question, from `monotonic`.
        position: The position that the server had written or replayed.
        is_standby: True if the server replays the WAL of another server.
    """

    asked: float
    position: Position
    is_standby: bool

    @classmethod
    def of(cls, row: Any, identity: Any, asked: float, timeline: int) -> "Answer":
        """Convert the rows that a server returned.

        Args:
            row: The row for `QUESTION`.
            identity: The row for `IDENTITY`.
            asked: The time of the question, from `monotonic`.
            timeline: The timeline of an earlier answer, which can only grow.
        """
        (is_standby, lsn, current), (cluster, block) = row, identity
        high, _, low = (lsn or "0/0").partition("/")
        number = (int(high, 16) << 32) + int(low, 16)
        if not is_standby and number % block == _PAGE_HEADER:
            # A primary counts the header of a new page at once, but a replica only with the first
            # record of the page, so leave the header out.
            number -= _PAGE_HEADER
        timeline = max(timeline, current)
        return cls(asked, Position(timeline, number, checksum(cluster)), is_standby)
