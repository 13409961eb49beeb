"""Writes the section of the document about replicas, which is a separate run."""

from collections.abc import Sequence
from pathlib import Path

from .report import table
from .stale_reads import Seen

HEADING = "## Replicas"
_TEMPLATE = Path(__file__).parent / "replicas.md"


def section(command: str, seconds: float, found: Sequence[Seen]) -> str:
    """Return what the clients of each router saw under each fault."""
    own = [each for each in found if each.is_own]
    return _TEMPLATE.read_text().format(
        command=command,
        seconds=seconds,
        reads=sum(each.reads for each in own),
        writes=sum(each.writes for each in own),
        stale=sum(each.stale for each in own),
        back=sum(each.back for each in own),
        table=as_table(found),
    )


def as_table(found: Sequence[Seen]) -> str:
    """Return all counts as a table in Markdown."""
    return table(
        ("fault", "router", "reads", "writes", "stale", "steps back", "failed"),
        (
            [each.fault, each.router]
            + [f"{n:,}" for n in (each.reads, each.writes, each.stale, each.back, each.failed)]
            for each in found
        ),
    )
