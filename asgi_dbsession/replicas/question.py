"""The question to a server how far it is, and the answer."""

from typing import Any, NamedTuple

from .position import Position, checksum

# On a standby, the timeline of what it receives is shown to roles with `pg_read_all_stats`. Others
# see the timeline of the last restart point, which follows a promotion some minutes later.
QUESTION = """
SELECT standby,
       CAST(CASE WHEN standby THEN pg_last_wal_replay_lsn()
                 ELSE pg_current_wal_insert_lsn() END AS text),
       CASE WHEN standby THEN (SELECT received_tli FROM pg_stat_wal_receiver)
            ELSE CAST(CAST('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)
                      AS bit(32)) AS integer) END,
       (SELECT timeline_id FROM pg_control_checkpoint()),
       (SELECT system_identifier FROM pg_control_system()),
       CAST(current_setting('wal_block_size') AS integer)
FROM (SELECT pg_is_in_recovery() AS standby OFFSET 0) AS server
"""

# Bytes at the start of each page of the WAL.
_PAGE_HEADER = 24


class Answer(NamedTuple):
    """How far a server was.

    Attributes:
        asked: When the question was sent, as of `monotonic`.
        position: What it had written, or replayed.
        is_standby: Whether it replays what another server writes.
    """

    asked: float
    position: Position
    is_standby: bool

    @classmethod
    def of(cls, row: Any, asked: float, timeline: int) -> "Answer":
        """Read the row that a server has answered.

        Args:
            row: The row.
            asked: When it was asked.
            timeline: The timeline of an earlier answer; timelines only grow.
        """
        is_standby, lsn, current, checkpoint, cluster, block = row
        high, _, low = (lsn or "0/0").partition("/")
        number = (int(high, 16) << 32) + int(low, 16)
        if not is_standby and number % block == _PAGE_HEADER:
            number -= _PAGE_HEADER  # a page without a record: replicas do not replay its header yet
        timeline = max(timeline, current or checkpoint)
        return cls(asked, Position(timeline, number, checksum(cluster)), is_standby)
