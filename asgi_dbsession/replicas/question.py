"""The SQL statement that asks a server for its WAL position, and the answer."""

from typing import Any, NamedTuple

from .position import Position, checksum

# A replica shows the timeline that it receives only to roles with `pg_read_all_stats`. Other roles
# see the timeline of the last restart point, which follows a promotion some minutes later.
QUESTION = """
SELECT standby,
       CAST(CASE WHEN standby THEN pg_last_wal_replay_lsn()
                 ELSE pg_current_wal_insert_lsn() END AS text),
       CAST(CASE WHEN standby THEN pg_last_wal_replay_lsn()
                 ELSE pg_current_wal_flush_lsn() END AS text),
       CASE WHEN standby THEN coalesce((SELECT received_tli FROM pg_stat_wal_receiver),
                                       (SELECT timeline_id FROM pg_control_checkpoint()))
            ELSE CAST(CAST('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)
                      AS bit(32)) AS integer) END
FROM (SELECT pg_is_in_recovery() AS standby OFFSET 0) AS server
"""

# Asked once for each connection, because the server reads a file to answer. The last column changes
# when a server starts again, and when it recovers from a crash, which resets its statistics.
IDENTITY = """
SELECT system_identifier,
       CAST(current_setting('wal_block_size') AS integer),
       pg_size_bytes(current_setting('wal_segment_size')),
       concat(extract(epoch FROM pg_postmaster_start_time()), ' ',
              (SELECT extract(epoch FROM stats_reset) FROM pg_stat_bgwriter))
FROM pg_control_system()
"""
# Where a connection keeps the answer.
KEY = "asgi_dbsession.identity"

# The number of bytes in the header of a WAL page, and of the first page of a segment.
_PAGE_HEADER, _SEGMENT_HEADER = 24, 40


class Answer(NamedTuple):
    """The WAL position of a server at one time.

    Attributes:
        asked: The time of the question, from `monotonic`.
        position: The position that the server had written or replayed.
        is_standby: True if the server replays the WAL of another server.
        flushed: The position up to which a primary has sent its WAL. An idle primary may keep the
            WAL after it for 15 seconds.
        name: The name of the server since its last start. A replica that crashed and starts again
            has another name: it accepts readers before it has replayed all that it had replayed.
    """

    asked: float
    position: Position
    is_standby: bool
    flushed: Position
    name: str

    @classmethod
    def of(cls, row: Any, identity: Any, asked: float, timeline: int, address: object) -> "Answer":
        """Convert the rows that a server returned.

        Args:
            row: The row for `QUESTION`.
            identity: The row for `IDENTITY`.
            asked: The time of the question, from `monotonic`.
            timeline: The timeline of an earlier answer, which can only grow.
            address: The address of the server.
        """
        is_standby, lsn, flushed, current = row
        cluster, block, segment, start = identity
        number = _number(lsn)
        # A primary counts the header of a new page at once, but a replica only with the first
        # record of the page, so leave the header out.
        if not is_standby and number % segment == _SEGMENT_HEADER:
            number -= _SEGMENT_HEADER
        elif not is_standby and number % block == _PAGE_HEADER:
            number -= _PAGE_HEADER
        timeline = max(timeline, current)
        position = Position(timeline, number, checksum(cluster))
        sent = position._replace(lsn=min(number, _number(flushed)))
        return cls(asked, position, is_standby, sent, checksum((address, start)))


def _number(lsn: str | None) -> int:
    high, _, low = (lsn or "0/0").partition("/")
    return (int(high, 16) << 32) + int(low, 16)
