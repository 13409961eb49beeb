"""The SQL queries that ask a server for its WAL position, and the class of the answer."""

from typing import Any, NamedTuple

from .position import Position, checksum

# This query asks a server for its WAL position and its timeline, a number that grows when a replica
# is promoted to primary. Requests read from a replica only if it has the timeline of the primary.
# If the role has no `pg_read_all_stats`, a replica reports a new timeline some minutes late. During
# these minutes, no request reads from this replica.
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

# This query asks which server this is, and when it was last started. After a crash, PostgreSQL may
# keep its start time, but it resets its statistics. So the last column contains the start time and
# the time of this reset. If this column is the same as before, there was no restart and no crash.
IDENTITY = """
SELECT system_identifier,
       CAST(current_setting('wal_block_size') AS integer),
       pg_size_bytes(current_setting('wal_segment_size')),
       concat(extract(epoch FROM pg_postmaster_start_time()), ' ',
              (SELECT extract(epoch FROM stats_reset) FROM pg_stat_bgwriter))
FROM pg_control_system()
"""
# Under this key, store the answer to the query `IDENTITY` (which server this is) in the dictionary
# `connection.info`. Then the query is sent only once on each connection. To answer it, the server
# must read a file.
KEY = "asgi_dbsession.identity"

# The sizes in bytes of two headers in the WAL: of each page, and of the first page in a WAL
# segment.
_PAGE_HEADER, _SEGMENT_HEADER = 24, 40


class Answer(NamedTuple):
    """What a server answered to the query for its WAL position.

    Attributes:
        asked: When the query was sent, as a time of Python's `monotonic`.
        position: How far a primary has written the WAL, or a replica has replayed it.
        is_standby: True if the server is a replica.
        flushed: How far a primary has written to disk. Replicas get only this part.
        name: A checksum of the server's address and of its last start.
    """

    asked: float
    position: Position
    is_standby: bool
    flushed: Position
    name: str

    @classmethod
    def of(cls, row: Any, identity: Any, asked: float, timeline: int, address: object) -> "Answer":
        """Make an `Answer` (the WAL position of a server) from the rows that the server returned.

        Args:
            row: The row for the query `QUESTION`, which asks for the WAL position and the timeline.
            identity: The row for the query `IDENTITY`, which asks which server this is, and when it
                was last started.
            asked: When the server was asked, as a time of Python's `monotonic`.
            timeline: The timeline in the last answer of this server.
            address: The address of the server, for the attribute `name`.
        """
        is_standby, lsn, flushed, current = row
        cluster, block, segment, start = identity
        number = _number(lsn)
        # In a new WAL page, a primary counts the page header at once, but a replica only with the
        # first record. So subtract the header, to compare the positions.
        if not is_standby and number % segment == _SEGMENT_HEADER:
            number -= _SEGMENT_HEADER
        elif not is_standby and number % block == _PAGE_HEADER:
            number -= _PAGE_HEADER
        # The timeline of a server only increases, so ignore a smaller number.
        timeline = max(timeline, current)
        position = Position(timeline, number, checksum(cluster))
        sent = position._replace(lsn=min(number, _number(flushed)))
        # After a restart, a replica may show older data than before, so it gets a new name.
        return cls(asked, position, is_standby, sent, checksum((address, start)))


def _number(lsn: str | None) -> int:
    high, _, low = (lsn or "0/0").partition("/")
    return (int(high, 16) << 32) + int(low, 16)
