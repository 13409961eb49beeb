"""The same figures as a picture, on a background of its own for light and dark."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from .tools import OURS, title

_ROW, _TOP, _LEFT, _WIDTH, _GAP = 26, 64, 350, 150, 62
_STYLE = """
:root { --ground: #ffffff; --ink: #24292f; --faint: #8c959f; --bar: #b6c2cf; --ours: #2f6f9f; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #1b1f24; --ink: #e6edf3; --faint: #7d8590; --bar: #4a5563; --ours: #58a6d6; }
}
.ground { fill: var(--ground); } .bar { fill: var(--bar); } .ours { fill: var(--ours); }
text { fill: var(--ink); font: 13px system-ui, sans-serif; } .head { font-weight: 600; }
.small { font-size: 11px; fill: var(--faint); }
line { stroke: var(--ink); } .one { stroke: var(--faint); stroke-dasharray: 3 3; }
"""


class Panel(NamedTuple):
    """One column of bars.

    Attributes:
        head: What it shows.
        unit: What its figures are.
        values: Of each tool: lower quartile, median, upper quartile.
        one: Whether 1 is what the others are compared with.
    """

    head: str
    unit: str
    values: dict[str, Sequence[float]]
    one: bool = True


def picture(found: dict[str, Any]) -> str:
    """An SVG."""
    panels = [_ratios(found, each) for each in ("no database use", "one SELECT", "one INSERT")]
    crowds = list(found["slow readers"].items())
    crowd, slow = next((each for each in crowds if each[0] == "100"), crowds[-1])
    downloads = {tool: figures["taken"] for tool, figures in slow.items()}
    panels.append(Panel("slow readers", f"downloads/s, {crowd} clients", downloads, one=False))
    tools = list(panels[0].values)
    width = _LEFT + len(panels) * (_WIDTH + _GAP)
    height = _TOP + len(tools) * _ROW + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>What a request costs with each tool</title><style>{_STYLE}</style>",
        f'<rect class="ground" width="{width}" height="{height}" rx="8"/>',
    ]
    for number, tool in enumerate(tools):
        name = escape(title(tool).replace("`", ""))
        head = " head" if tool == OURS else ""
        parts.append(_text(_LEFT - 12, _TOP + number * _ROW + 17, name, head, anchor="end"))
    for number, panel in enumerate(panels):
        parts += _drawn(panel, _LEFT + number * (_WIDTH + _GAP), tools)
    return "\n".join([*parts, "</svg>\n"])


def _ratios(found: dict[str, Any], scenario: str) -> Panel:
    figures = found["in process"]["FastAPI"][scenario]
    values = {tool: each["to by hand"] for tool, each in figures.items()}
    return Panel(scenario, "time, by hand = 1", values)


def _drawn(panel: Panel, left: int, tools: Sequence[str]) -> list[str]:
    most = max(high for _, _, high in panel.values.values()) or 1
    scale = _WIDTH / most
    parts = [_text(left, 26, panel.head, "head"), _text(left, 44, panel.unit, "small")]
    for number, tool in enumerate(tools):
        low, middle, high = panel.values[tool]
        top = _TOP + number * _ROW
        kind = "ours" if tool == OURS else "bar"
        parts += [
            _bar(left, top + 4, middle * scale, kind),
            _line(left + low * scale, left + high * scale, top + _ROW / 2),
            _text(left + max(middle, high) * scale + 5, top + 17, f"{middle:.2f}", "small"),
        ]
    if panel.one:
        x, bottom = left + scale, _TOP + len(tools) * _ROW
        parts.append(f'<line class="one" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
    return parts


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" class="{kind.strip()}" text-anchor="{anchor}">{words}</text>'


def _bar(x: float, y: float, width: float, kind: str) -> str:
    size = f'width="{width:.1f}" height="{_ROW - 8}"'
    return f'<rect class="{kind}" x="{x:.1f}" y="{y}" {size} rx="2"/>'


def _line(left: float, right: float, y: float) -> str:
    return f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>'
