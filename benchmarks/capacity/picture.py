"""The same figures as a picture, in the style of the one of `benchmarks.speed`."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.speed.picture import STYLE, bar, text

from .model import Way
from .overload import HEAVY
from .scale import READERS, Need
from .storm import CAPACITY

_ROW, _HEAD, _FOOT, _PANEL, _BAR, _EDGE = 34, 58, 18, 344, 250, 14
_WORDS = {
    Way.UNTIL_READ: "held until the response has been read",
    Way.UNTIL_COMMIT: "held until COMMIT",
    Way.STATEMENTS: "asgi-dbsession",
}
OURS = _WORDS[Way.STATEMENTS]


class Panel(NamedTuple):
    """One chart of bars: what it shows, in which unit, and the bars with their names."""

    head: str
    unit: str
    bars: list[tuple[str, float]]


def picture(needs: Sequence[Need], useful: Sequence[tuple[str, float]], columns: int) -> str:
    """An SVG, with so many panels side by side.

    Args:
        needs: Connections that each way needs.
        useful: For each `pool_timeout`, answers per second that came in time.
        columns: How many panels are side by side.
    """
    panels = [
        Panel(
            readers,
            "connections to the server, behind PgBouncer",
            [(_WORDS[each.way], each.on_server) for each in needs if each.readers == readers],
        )
        for readers in READERS
    ]
    head = f"overload: {HEAVY * CAPACITY:.0f} requests/s, {CAPACITY:.0f} fit"
    panels.append(Panel(head, "answers in time per second, by pool_timeout", list(useful)))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    tall = [_HEAD + max(len(each.bars) for each in row) * _ROW + _FOOT for row in rows]
    width, height = columns * _PANEL, sum(tall)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>How many connections are needed (simulated)</title><style>{STYLE}</style>",
        f'<rect class="ground" width="{width}" height="{height}" rx="8"/>',
    ]
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            parts += _drawn(panel, column * _PANEL + _EDGE, sum(tall[:number]))
    return "\n".join([*parts, "</svg>\n"])


def _drawn(panel: Panel, left: float, top: float) -> list[str]:
    scale = _BAR / max(value for _, value in panel.bars)
    parts = [text(left, top + 26, panel.head, "panel"), text(left, top + 44, panel.unit, "small")]
    for number, (name, value) in enumerate(panel.bars):
        y = top + _HEAD + number * _ROW
        shown = f"{value:,.0f}".replace(",", " ")
        parts += [
            text(left, y + 12, name, "head" if name == OURS else ""),
            bar(left, y + 17, value * scale, "ours" if name == OURS else "bar"),
            text(left + value * scale + 6, y + 27, shown, "small"),
        ]
    return parts
