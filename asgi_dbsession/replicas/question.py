"""The SQL queries that ask a server for its WAL position, and the answer of the server."""

from typing import Any, NamedTuple

from .position import Position, checksum

# Only roles with `pg_read_all_stats` may read `received_tli`, the timeline that a replica receives.
# For all other roles, the query returns the timeline of the last restart point, which changes some
# minutes after a promotion.
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

# This query is sent only once on each connection, because the server must read a file to answer.
# The last column changes when the server restarts. It also changes when the server recovers from a
# crash, because the recovery resets the statistics.
IDENTITY = """
SELECT system_identifier,
       CAST(current_setting('wal_block_size') AS integer),
       pg_size_bytes(current_setting('wal_segment_size')),
       concat(extract(epoch FROM pg_postmaster_start_time()), ' ',
              (SELECT extract(epoch FROM stats_reset) FROM pg_stat_bgwriter))
FROM pg_control_system()
"""
# The key of `connection.info` for the answer to `IDENTITY`.
KEY = "asgi_dbsession.identity"

# The number of bytes in the header of a WAL page, and of the first page of a segment.
_PAGE_HEADER, _SEGMENT_HEADER = 24, 40


class Answer(NamedTuple):
    """The WAL position of a server at one time.

    Attributes:
        asked: The time at which the query was sent, from `monotonic`.
        position: The WAL position up to which a primary has written, or a replica has replayed.
        is_standby: True if the server replays the WAL of another server.
        flushed: The WAL position up to which a primary has sent its WAL. If the primary is idle, it
            may send the WAL after this position up to 15 seconds later.
        name: A checksum for the server and its last start. After a restart or crash, a replica has
            another name, because it may accept readers before it has replayed the WAL up to its
            earlier position.
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
            row: The row that the query `QUESTION` returned.
            identity: The row that the query `IDENTITY` returned.
            asked: The time at which the query was sent, from `monotonic`.
            timeline: The timeline of the server's earlier answer; a timeline number can only grow.
            address: The address of the server.
        """
        is_standby, lsn, flushed, current = row
        cluster, block, segment, start = identity
        number = _number(lsn)
        # At the start of a new WAL page, the position of a primary includes the header of the page.
        # The position of a replica includes this header only together with the first record of the
        # page. So subtract the header from the position of a primary.
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
