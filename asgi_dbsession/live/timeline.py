"""Draws units of work on a time axis."""

from collections.abc import Iterable, Sequence
from html import escape

from asgi_dbsession.reports.stats import Kind, Stretch

from .observer import EndedUnit

_WIDTH = 1200
_ROWS = 60
_ROW = 5
_HEIGHT = _ROWS * _ROW
# Older units are not drawn: they would be too small to see.
_SECONDS = 30.0
# The smallest that can be seen.
_LEAST = 1.5
# What is drawn above what.
_ORDER: tuple[Kind, ...] = ("wait", "hold", "statement", "rollback", "commit")


def draw(ended: Sequence[EndedUnit], now: float) -> str:
    """An SVG of the units of the last seconds, each a bar in the first row that is free."""
    begin = now - _SECONDS
    rows = [begin] * _ROWS
    bars: dict[Kind, list[str]] = {kind: [] for kind in _ORDER}
    left_out = 0
    for unit in sorted(ended, key=lambda each: each.began):
        if unit.ended <= begin:
            continue
        row = next((number for number, free in enumerate(rows) if free <= unit.began), None)
        if row is None:
            left_out += 1
            continue
        rows[row] = max(unit.ended, unit.began + _SECONDS * (_LEAST + 1) / _WIDTH)
        _draw_unit(unit, begin, row * _ROW, bars)
    drawn = "".join(bar for kind in _ORDER for bar in bars[kind])
    note = f"<p class=note>{left_out} more units do not fit.</p>" if left_out else ""
    return f"{_frame(drawn)}{note}"


def _frame(drawn: str) -> str:
    lines = "".join(
        f'<path class=grid d="M{x} 0V{_HEIGHT}"/>' for x in range(0, _WIDTH + 1, _WIDTH // 6)
    )
    step = int(_SECONDS) // 6
    labels = "".join(f"<span>{number * step or 'now'}</span>" for number in range(6, -1, -1))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio=none role=img '
        'aria-label="Units of work of the last 30 seconds; the table below says the same.">'
        f"{lines}{drawn}</svg><p class=axis aria-hidden=true>{labels}</p>"
    )


def _draw_unit(unit: EndedUnit, begin: float, y: int, bars: dict[Kind, list[str]]) -> None:
    title = f"<title>{escape(_title(unit))}</title>"
    for stretch in _stretches(unit):
        left = max(0.0, (stretch.start - begin) / _SECONDS * _WIDTH)
        width = max(_LEAST, (stretch.stop - begin) / _SECONDS * _WIDTH - left)
        bars[stretch.kind].append(
            f'<rect class={stretch.kind} x="{left:.1f}" y="{y}" width="{width:.1f}" '
            f'height="{_ROW - 1}">{title}</rect>'
        )


def _stretches(unit: EndedUnit) -> Iterable[Stretch]:
    """All stretches, neighbours of one kind as one: a thousand statements are one bar."""
    for _, tally in unit.tallies:
        last: Stretch | None = None
        for each in tally.stretches:
            gap = each.start - last.stop if last is not None else 0
            if last is not None and last.kind == each.kind and gap < _SECONDS / _WIDTH:
                last = last._replace(stop=each.stop)
                continue
            if last is not None:
                yield last
            last = each
        if last is not None:
            yield last


def _title(unit: EndedUnit) -> str:
    waited = sum(tally.wait_time for _, tally in unit.tallies)
    held = sum(tally.use_time for _, tally in unit.tallies)
    worked = sum(tally.operation_duration for _, tally in unit.tallies)
    count = sum(tally.statements for _, tally in unit.tallies)
    outcome = unit.outcome.replace("_", " ")
    return (
        f"{unit.route}: {outcome} {unit.reason}; waited {waited:.3f} s, held {held:.3f} s, "
        f"of which idle {max(0.0, held - worked):.3f} s; statements: {count}"
    )
