"""Draws the figures as a picture, with a background for light and dark pages.

On a page, its type is shown at the size that is written here: one column of panels is as wide as
a telephone, and two are as wide as the text of a page on a desk.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from .tools import OURS, title

_ROW, _HEAD, _FOOT, _PANEL, _BAR, _EDGE = 34, 58, 18, 344, 250, 14
STYLE = """
:root { --ground: #ffffff; --ink: #24292f; --faint: #59636e; --bar: #b6c2cf; --ours: #2f6f9f; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #1b1f24; --ink: #e6edf3; --faint: #9198a1; --bar: #4a5563; --ours: #58a6d6; }
}
.ground { fill: var(--ground); } .bar { fill: var(--bar); } .ours { fill: var(--ours); }
text { fill: var(--ink); font: 12.5px system-ui, sans-serif; } .head { font-weight: 600; }
.panel { font-size: 15px; font-weight: 600; } .small { fill: var(--faint); }
line { stroke: var(--ink); } .one { stroke: var(--faint); stroke-dasharray: 3 3; }
"""


class Panel(NamedTuple):
    """One bar chart.

    Attributes:
        head: The title of the chart.
        unit: The unit of the figures.
        values: The lower quartile, the median and the upper quartile of each tool.
        one: True if the chart shows ratios, with a line at 1.
    """

    head: str
    unit: str
    values: dict[str, Sequence[float]]
    one: bool = True


def picture(found: dict[str, Any], columns: int) -> str:
    """Return an SVG with so many charts side by side."""
    panels = [_ratios(found, each) for each in ("no database use", "one SELECT", "one INSERT")]
    crowds = list(found["slow readers"].items())
    crowd, slow = next((each for each in crowds if each[0] == "100"), crowds[-1])
    downloads = {tool: figures["taken"] for tool, figures in slow.items()}
    unit = f"downloads per second, {crowd} clients; more is better"
    panels.append(Panel("slow readers", unit, downloads, one=False))
    tall = _HEAD + len(panels[0].values) * _ROW + _FOOT
    width, height = columns * _PANEL, -(-len(panels) // columns) * tall
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>What a request costs with each tool</title><style>{STYLE}</style>",
        f'<rect class="ground" width="{width}" height="{height}" rx="8"/>',
    ]
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        parts += _drawn(panel, column * _PANEL + _EDGE, row * tall)
    return "\n".join([*parts, "</svg>\n"])


def _ratios(found: dict[str, Any], scenario: str) -> Panel:
    figures = found["in process"]["FastAPI"][scenario]
    values = {tool: each["ratio"] for tool, each in figures.items()}
    return Panel(scenario, "time, hand-written = 1; less is better", values)


def _drawn(panel: Panel, left: float, top: float) -> list[str]:
    most = max(high for _, _, high in panel.values.values()) or 1
    scale = _BAR / most
    parts = [text(left, top + 26, panel.head, "panel"), text(left, top + 44, panel.unit, "small")]
    for number, (tool, (low, middle, high)) in enumerate(panel.values.items()):
        y = top + _HEAD + number * _ROW
        name = escape(title(tool).replace("`", ""))
        parts += [
            text(left, y + 12, name, "head" if tool == OURS else ""),
            bar(left, y + 17, middle * scale, "ours" if tool == OURS else "bar"),
            _line(left + low * scale, left + high * scale, y + 22),
            text(left + max(middle, high) * scale + 6, y + 27, f"{middle:.2f}", "small"),
        ]
    if panel.one:
        x = left + scale
        for number in range(len(panel.values)):  # not through the names
            y = top + _HEAD + number * _ROW
            parts.append(
                f'<line class="one" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 15}" y2="{y + 29}"/>'
            )
    return parts


def text(x: float, y: float, words: str, kind: str) -> str:
    """Words, which begin there."""
    return f'<text x="{x:.1f}" y="{y}" class="{kind}">{words}</text>'


def bar(x: float, y: float, width: float, kind: str) -> str:
    """A bar, ten pixels high."""
    return f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="10" rx="2"/>'


def _line(left: float, right: float, y: float) -> str:
    return f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>'
