"""Draws line charts as SVG text, without any library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 30, 42
_LOG_STEPS = (1, 2, 5)


@dataclass(frozen=True)
class Series:
    """One line. `color` is one of CSS. `dash` is an SVG dash pattern; "" is a solid line. With `dots`, each point shows
    its values."""

    name: str
    color: str
    points: tuple[tuple[float, float], ...]
    dash: str = ""
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart's frame: what its axes mean and how far they go. Axes begin at 0, a logarithmic one at its data."""

    title: str
    x_label: str
    y_label: str
    width: int = 420
    height: int = 270
    log_x: bool = False
    log_y: bool = False
    x_min: float | None = None
    """Where a logarithmic axis begins at the least; smaller values are drawn there."""
    x_max: float | None = None
    y_max: float | None = None
    y_line: float | None = None
    """A dotted level, such as an objective: the axis reaches as far."""
    x_line: float | None = None
    line_name: str = ""
    shaded_to: float | None = None
    """The stretch from 0 to here is shaded: it does not count."""


def draw(chart: Chart, series: Sequence[Series]) -> str:
    """The chart as an <svg> element. Series without points are left out."""
    drawn = [each for each in series if each.points]
    xs = [x for each in drawn for x, _ in each.points] + ([chart.x_line] if chart.x_line else [])
    ys = [y for each in drawn for _, y in each.points] + ([chart.y_line] if chart.y_line else [])
    x_axis = _axis([max(x, chart.x_min or x) for x in xs], chart.x_max, chart.log_x, _LEFT, chart.width - _RIGHT)
    y_axis = _axis(ys, chart.y_max, chart.log_y, chart.height - _BOTTOM, _TOP)
    parts = [_frame(chart, x_axis, y_axis)]
    if drawn:
        parts += _levels(chart, x_axis, y_axis)
    for each in drawn:
        # A logarithm has no place for what is not positive.
        path = [(x, y) for x, y in each.points if (x > 0 or not chart.log_x) and (y > 0 or not chart.log_y)]
        corners = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in path)
        dash = f' stroke-dasharray="{each.dash}"' if each.dash else ""
        parts.append(f'<polyline class="line" style="stroke:{each.color}"{dash} points="{corners}"/>')
        if each.dots:
            parts += [
                f'<circle cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3.5" style="fill:{each.color}">'
                f"<title>{escape(each.name)}: {_short(y)} at {_short(x)}</title></circle>"
                for x, y in path
            ]
    if not drawn:
        parts.append(f'<text x="{chart.width / 2}" y="{chart.height / 2}" class="none">nothing measured</text>')
    size = f'viewBox="0 0 {chart.width} {chart.height}"'
    return f'<svg {size} role="img" aria-label="{escape(chart.title)}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    is_log: bool
    start: float
    end: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """The place of a value in the drawing, kept within the axis."""
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        number = math.log(max(value, self.low)) if self.is_log else value
        share = min(1.0, max(0.0, (number - low) / (high - low)))
        return self.start + share * (self.end - self.start)


def _axis(values: Sequence[float], maximum: float | None, is_log: bool, start: float, end: float) -> _Axis:
    if is_log:
        positive = [value for value in values if value > 0] or [1.0]
        low, high = min(positive), maximum or max(positive)
        high = max(high, low * 2)
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        candidates = [step * 10.0**decade for decade in decades for step in _LOG_STEPS]
        low = max(tick for tick in candidates if tick <= low * 1.0001)
        ticks = [tick for tick in candidates if low <= tick <= high * 1.0001]
        while len(ticks) > 8:
            ticks = ticks[::2]
        return _Axis(low, high, True, start, end, tuple(ticks))
    high = maximum or max(values, default=1.0) * 1.05 or 1.0
    step = nice_step(high / 5)
    return _Axis(0.0, high, False, start, end, tuple(step * index for index in range(int(high / step + 1e-9) + 1)))


def nice_step(roughly: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least this."""
    power = 10.0 ** math.floor(math.log10(roughly))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= roughly * 0.9999)


def _frame(chart: Chart, x_axis: _Axis, y_axis: _Axis) -> str:
    parts = [f'<text x="{_LEFT}" y="16" class="title">{escape(chart.title)}</text>']
    if chart.shaded_to:
        width = x_axis.at(chart.shaded_to) - _LEFT
        height = y_axis.start - y_axis.end
        parts.append(f'<rect class="shade" x="{_LEFT}" y="{y_axis.end}" width="{width:.1f}" height="{height}"/>')
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{x_axis.end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="tick end">{_short(tick)}</text>')
    for tick in x_axis.ticks:
        x = x_axis.at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{y_axis.start}" y2="{y_axis.end}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y_axis.start + 15}" class="tick mid">{_short(tick)}</text>')
    middle = (x_axis.start + x_axis.end) / 2
    parts.append(f'<text x="{middle}" y="{chart.height - 8}" class="label mid">{escape(chart.x_label)}</text>')
    half = (y_axis.start + y_axis.end) / 2
    parts.append(f'<text transform="translate(13 {half}) rotate(-90)" class="label mid">{escape(chart.y_label)}</text>')
    return "".join(parts)


def _levels(chart: Chart, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    """The dotted lines, each with its name at its end."""
    parts = []
    if chart.y_line is not None:
        y = y_axis.at(chart.y_line)
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{x_axis.end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        below = y < y_axis.end + 16  # above it stands the title
        height = y + 13 if below else y - 4
        parts.append(f'<text x="{_LEFT + 5}" y="{height:.1f}" class="level-name">{escape(chart.line_name)}</text>')
    if chart.x_line is not None:
        x = x_axis.at(chart.x_line)
        parts.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{y_axis.start}" y2="{y_axis.end}"/>')
        # On the side where there is room.
        place, side = (x - 5, " end") if x > (x_axis.start + x_axis.end) / 2 else (x + 5, "")
        name = escape(chart.line_name)
        parts.append(f'<text x="{place:.1f}" y="{y_axis.start - 6}" class="level-name{side}">{name}</text>')
    return parts


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
