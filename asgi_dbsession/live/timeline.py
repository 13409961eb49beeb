"""Draws the ended units of work on a time axis."""

from collections.abc import Iterable, Sequence
from html import escape

from asgi_dbsession.reports.tally import Kind, Span

from .observer import EndedUnit

_WIDTH = 1200
_HEIGHT = 300
# The drawing has 12, 30 or 75 rows. Use the smallest number that gives each ended unit of work a
# place: with fewer rows, each row is higher. If 75 rows are too few, leave out the other units.
_ROWS = (12, 30, 75)
# The length of the time axis in seconds. On a longer time axis, the bars would be too narrow.
_SECONDS = 30.0
# The smallest width of a bar, so that it is still visible, in units of the SVG drawing.
_LEAST = 1.5
# The rectangles for what a session did are drawn in this order. So a statement covers a part of
# `hold`, the time in which the session held a connection.
_ORDER: tuple[Kind, ...] = ("wait", "hold", "statement", "rollback", "commit")


def draw(ended: Sequence[EndedUnit], now: float) -> str:
    """Return an SVG drawing of the last seconds, in which each unit of work is a bar."""
    begin = now - _SECONDS
    # For each row of bars in the drawing, the time when its last bar ends. A row has room for
    # another bar if this bar begins later.
    rows: list[float] = []
    placed: list[tuple[EndedUnit, int]] = []
    left_out = 0
    for unit in sorted(ended, key=lambda each: each.began):
        row = next((number for number, free in enumerate(rows) if free <= unit.began), len(rows))
        if unit.ended <= begin or row == _ROWS[-1]:
            left_out += unit.ended > begin
            continue
        if row == len(rows):
            rows.append(begin)
        rows[row] = max(unit.ended, unit.began + _SECONDS * (_LEAST + 1) / _WIDTH)
        placed.append((unit, row))
    # The drawing always has the same height. So if it has more rows, each row has less height.
    height = _HEIGHT / next(number for number in _ROWS if number >= len(rows))
    bars: dict[Kind, list[str]] = {kind: [] for kind in _ORDER}
    for unit, row in placed:
        _draw_unit(unit, begin, row * height, height - 1, bars)
    drawn = "".join(bar for kind in _ORDER for bar in bars[kind])
    return f"{_frame(drawn)}<p class=note>{_note(left_out)}</p>"


def _note(left_out: int) -> str:
    return f"{left_out} more units do not fit." if left_out else "Seconds ago. Each bar is a unit."


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


def _draw_unit(
    unit: EndedUnit, begin: float, y: float, height: float, bars: dict[Kind, list[str]]
) -> None:
    title = f"<title>{escape(_title(unit))}</title>"
    for span in _spans(unit):
        left = max(0.0, (span.start - begin) / _SECONDS * _WIDTH)
        width = max(_LEAST, (span.stop - begin) / _SECONDS * _WIDTH - left)
        bars[span.kind].append(
            f'<rect class={span.kind} x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}">{title}</rect>'
        )


def _spans(unit: EndedUnit) -> Iterable[Span]:
    """Yield what a unit of work did (it ran a statement, for example), with start and end.

    Each `Span` becomes a rectangle in the drawing. If the gap between two spans of the same kind is
    too small to be seen, join the two spans.
    """
    for _, tally in unit.tallies:
        last: Span | None = None
        for each in tally.spans():
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
