"""The SQL queries that ask a server for its WAL position, and the class of the answer."""

from typing import Any, NamedTuple

from .position import Position, checksum

# This query returns the WAL position of a server, and its timeline: a number that grows when a
# replica is promoted to primary. Requests read from a replica only if it has the same timeline as
# the primary. Only roles with `pg_read_all_stats` may read `received_tli`, the replica's current
# timeline. For other roles, the query returns the timeline of the last restart point. After another
# replica is promoted, that timeline is too old for some minutes. During these minutes, no request
# reads from the replica.
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

# This query identifies a server and its last start. The last column is a text with two times: when
# the server was started, and when its statistics were last reset. After a crash, the server may
# keep the first time, but it resets the statistics. So if the last column is the same as before,
# there was neither a restart nor a crash. The query is sent only once on each connection, because
# the server must read a file to answer it.
IDENTITY = """
SELECT system_identifier,
       CAST(current_setting('wal_block_size') AS integer),
       pg_size_bytes(current_setting('wal_segment_size')),
       concat(extract(epoch FROM pg_postmaster_start_time()), ' ',
              (SELECT extract(epoch FROM stats_reset) FROM pg_stat_bgwriter))
FROM pg_control_system()
"""
# Under this key, `connection.info` has the answer to the query `IDENTITY`: which server this is,
# and when it was started.
KEY = "asgi_dbsession.identity"

# The size in bytes of a header in the WAL: of each page, and of the first page in a WAL segment.
# When a page begins, a primary adds the header to its WAL position at once. A replica adds the
# header only together with the first record of the page. So `Answer.of` subtracts the header from
# the position of a primary. Otherwise a replica that has all changes would seem to be behind.
_PAGE_HEADER, _SEGMENT_HEADER = 24, 40


class Answer(NamedTuple):
    """What a server answered to the query for its WAL position.

    Attributes:
        asked: When the query was sent, as a time of Python's `monotonic`.
        position: Up to which position a primary has written the WAL, or a replica has replayed it.
        is_standby: True if the server is a replica, which replays the WAL of another server.
        flushed: Up to which position a primary has written the WAL to disk. Replicas get only this
            part of the WAL. An idle primary may write its last changes to disk up to 15 seconds
            later. For a replica, the same as `position`.
        name: A checksum of the address of the server and of the time of its last start. The name
            shows that a replica has restarted: then it may accept readers before it has replayed
            again the changes that it had replayed before.
    """

    asked: float
    position: Position
    is_standby: bool
    flushed: Position
    name: str

    @classmethod
    def of(cls, row: Any, identity: Any, asked: float, timeline: int, address: object) -> "Answer":
        """Make an `Answer`, which has the WAL position of a server, from the rows of two queries.

        Args:
            row: The row that the server returned for `QUESTION`, the query for its WAL position.
            identity: The row that the server returned for `IDENTITY`, the query that tells which
                server this is, and when it was started.
            asked: When the server was asked, as a time of Python's `monotonic`.
            timeline: The timeline in the last answer of this server. If the new answer has a
                smaller number, use the number of the last answer, because the timeline of a server
                only increases.
            address: The address of the server. The attribute `name` is made from this address.
        """
        is_standby, lsn, flushed, current = row
        cluster, block, segment, start = identity
        number = _number(lsn)
        # If a primary has just started a new WAL page, its position includes the header of this
        # page. A replica counts the header only together with the first record of the page. So
        # subtract the header, to make the two positions comparable.
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
