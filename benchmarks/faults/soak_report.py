"""Writes the section of the document about the soak test, which is a separate run."""

from collections.abc import Sequence

from .report import table
from .run import Result
from .soak import Soak, Usage

HEADING = "## A long run"


def soaked(command: str, soaks: Sequence[Soak]) -> str:
    """Return the counts of each driver, and the resources of the workers."""
    wholes = [each.whole for each in soaks]
    minutes = sum(each.seconds for each in soaks) / 60
    acknowledged = sum(len(each.ledger.acknowledged) for each in wholes)
    requests = sum(each.ledger.requests for each in wholes)
    faults = sum(each.faults for each in wholes)
    return f"""{HEADING}

This package alone, half of the writes with each driver, in {minutes:.0f} minutes:
{acknowledged} writes were acknowledged, in {requests} requests, and {faults} faults happened.
**{_found(wholes)}.** Made by `{command}`.

Six of ten requests are plain writes that no fault changes, so that most are acknowledged.
The other requests are those of the tables above.

{_counts(soaks)}
One of the two workers is never killed. This is what its process used, from after the first turn
to after the last:

{_usage(soaks)}"""


def _found(wholes: Sequence[Result]) -> str:
    lost, twice, phantom, half = (
        sum(getattr(each.finding, name) for each in wholes)
        for name in ("lost", "twice", "phantom", "half")
    )
    leaked = sum(each.held + each.open for each in wholes)
    return f"{lost} lost, {twice} stored twice, {phantom} phantom, {half} half, {leaked} leaked"


def _counts(soaks: Sequence[Soak]) -> str:
    columns = ("driver", "fault", "faults", "acknowledged", "refused", "open", "found")
    rows = [
        [
            soak.driver,
            result.fault,
            str(result.faults),
            str(len(result.ledger.acknowledged)),
            str(len(result.ledger.refused)),
            f"{len(result.ledger.open)} ({result.finding.open_stored})",
            ", ".join(result.complaints) or "✓",
        ]
        for soak in soaks
        for result in soak.results
    ]
    return table(columns, rows)


def _usage(soaks: Sequence[Soak]) -> str:
    columns = ("driver", "acknowledged so far", "memory", "descriptors", "tasks", "connections")
    rows = [_row(soak.driver, usage) for soak in soaks for usage in _few(soak.usage)]
    return table(columns, rows)


def _row(driver: str, usage: Usage) -> list[str]:
    counts = (usage.descriptors, usage.tasks, usage.connections)
    memory = f"{usage.memory:.1f} MB"
    return [driver, str(usage.acknowledged), memory, *map(str, counts)]


def _few(usage: Sequence[Usage]) -> list[Usage]:
    """Return the first, the second, the middle and the last entry."""
    places = sorted({0, min(1, len(usage) - 1), len(usage) // 2, len(usage) - 1})
    return [usage[place] for place in places]
