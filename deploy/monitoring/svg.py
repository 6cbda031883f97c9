"""Draws series over time as SVG, with the standard library alone: panels in a grid, events as numbered lines through all of them.

A value that is missing is a gap, never a guess: a line is broken where two points are further apart than GAP_STEPS steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from deploy.monitoring.panels import BARS, STACK

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b4a9e", "#7f7f7f")
"""Told apart by everybody; further lines begin again."""
PANEL_WIDTH, PLOT_HEIGHT = 460, 128
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 30, 22
LEGEND_LINE, CHARACTER = 15, 5.7
COLUMNS = 2
Y_TICKS = 4
GAP_STEPS = 1.6
_SMALL = 'font-size="10" fill="#555"'

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """points: (time, value), by time."""

    name: str
    points: Points


@dataclass(frozen=True, slots=True)
class Plot:
    """kind, unit: as in panels.py. step_s: how far apart the points were asked for. red: a value at which a line is drawn."""

    title: str
    kind: str
    unit: str
    lines: Sequence[Line]
    step_s: float
    red: float | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """What all panels show: times, and events by time."""

    begin: float
    end: float
    marks: Sequence[tuple[float, str]]


def figure(title: str, caption: Sequence[str], plots: Sequence[Plot], span: Span) -> str:
    """The whole document."""
    events = [f"{number}: {what}, {when - span.begin:.0f} s" for number, (when, what) in enumerate(span.marks, 1)]
    foot = ["Events: " + "; ".join(events), *caption]
    parts, y, width = [], 34.0, COLUMNS * PANEL_WIDTH
    for at in range(0, len(plots), COLUMNS):
        row = plots[at : at + COLUMNS]
        legends = [_wrapped(plot.lines) for plot in row]
        for column, (plot, legend) in enumerate(zip(row, legends, strict=True)):
            parts.append(f'<g transform="translate({column * PANEL_WIDTH},{y:g})">{"".join(_panel(plot, legend, span))}</g>')
        y += TOP + PLOT_HEIGHT + BOTTOM + LEGEND_LINE * max(len(legend) for legend in legends) + 12
    wrapped = [line for text in foot for line in _words(text, width - 24)]
    height = y + 14 * len(wrapped) + 8
    parts += [f'<text x="12" y="{y + 8 + 14 * n:g}" {_SMALL}>{escape(line)}</text>' for n, line in enumerate(wrapped)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}"'
        f' font-family="DejaVu Sans, Helvetica, Arial, sans-serif"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="12" y="22" font-size="15" font-weight="bold" fill="#111">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )


def _panel(plot: Plot, legend: Sequence[Sequence[int]], span: Span) -> Iterable[str]:
    drawn = _stacked(plot) if plot.kind in (STACK, BARS) else [line.points for line in plot.lines]
    values = [value for points in drawn for _, value in points]
    highest = max([0.0, *values])
    if plot.red is not None and highest > plot.red / 2:
        highest = max(highest, plot.red)  # a limit is shown once it is not far
    ticks = _ticks(min([0.0, *values]), highest, plot.unit)
    scale = _Scale(span.begin, span.end, ticks[0], ticks[-1])
    yield f'<text x="12" y="16" font-size="12" font-weight="bold" fill="#222">{escape(plot.title)}</text>'
    for tick in ticks:
        y = scale.y(tick)
        yield f'<path d="M{LEFT} {y:.1f}H{PANEL_WIDTH - RIGHT}" stroke="#e3e3e3"/>'
        label = escape(shown(tick, plot.unit, ticks[-1]))
        yield f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end" {_SMALL}>{label}</text>'
    for when in _times(span.end - span.begin):
        x = scale.x(span.begin + when)
        yield f'<text x="{x:.1f}" y="{TOP + PLOT_HEIGHT + 15}" text-anchor="middle" {_SMALL}>{when:g} s</text>'
    for number, (when, _) in enumerate(span.marks, 1):
        x = scale.x(when)
        yield f'<path d="M{x:.1f} {TOP}v{PLOT_HEIGHT}" stroke="#888" stroke-dasharray="2 3"/>'
        yield f'<text x="{x:.1f}" y="{TOP - 3}" text-anchor="middle" {_SMALL}>{number}</text>'
    if plot.red is not None and ticks[0] <= plot.red <= ticks[-1]:
        yield f'<path d="M{LEFT} {scale.y(plot.red):.1f}H{PANEL_WIDTH - RIGHT}" stroke="#c00" stroke-dasharray="5 3"/>'
    yield from (_areas if plot.kind in (STACK, BARS) else _lines)(plot, drawn, scale)
    yield from _legend(plot, legend)


def _legend(plot: Plot, legend: Sequence[Sequence[int]]) -> Iterable[str]:
    for number, row in enumerate(legend):
        x, y = float(LEFT), TOP + PLOT_HEIGHT + BOTTOM + LEGEND_LINE * number + 10
        for index in row:
            yield f'<rect x="{x:.1f}" y="{y - 8}" width="9" height="9" fill="{_colour(index)}"/>'
            yield f'<text x="{x + 13:.1f}" y="{y}" {_SMALL}>{escape(plot.lines[index].name)}</text>'
            x += _width(plot.lines[index].name)


@dataclass(frozen=True, slots=True)
class _Scale:
    begin: float
    end: float
    low: float
    high: float

    def x(self, when: float) -> float:
        return LEFT + (when - self.begin) / (self.end - self.begin) * (PANEL_WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + PLOT_HEIGHT * (1 - (value - self.low) / (self.high - self.low))


def _lines(plot: Plot, drawn: Sequence[Points], scale: _Scale) -> Iterable[str]:
    for index, points in enumerate(drawn):
        for run in runs(points, plot.step_s):
            path = "L".join(f"{scale.x(when):.1f} {scale.y(value):.1f}" for when, value in run)
            dot = "h0.1" if len(run) == 1 else ""
            yield f'<path d="M{path}{dot}" fill="none" stroke="{_colour(index)}" stroke-width="1.4" stroke-linecap="round"/>'


def _areas(plot: Plot, drawn: Sequence[Points], scale: _Scale) -> Iterable[str]:
    """Each as high as its own value, on top of those before it. A value holds until the next one; a bar is what happened
    since the one before."""
    for index, points in enumerate(drawn):
        own = dict(plot.lines[index].points)
        boxes: list[tuple[float, float, float, float]] = []  # from, to, top, bottom
        for when, top in points:
            begin, end = (when - plot.step_s, when) if plot.kind == BARS else (when, when + plot.step_s)
            begin, end, bottom = max(begin, scale.begin), min(end, scale.end), top - own[when]
            if boxes and boxes[-1][1] == begin and boxes[-1][2:] == (top, bottom) and plot.kind == STACK:
                boxes[-1] = (boxes[-1][0], end, top, bottom)
            elif own[when] and end > begin:
                boxes.append((begin, end, top, bottom))
        path = "".join(
            f"M{scale.x(begin):.1f} {scale.y(top):.1f}H{scale.x(end):.1f}V{scale.y(bottom):.1f}H{scale.x(begin):.1f}z"
            for begin, end, top, bottom in boxes
        )
        if path:
            yield f'<path d="{path}" fill="{_colour(index)}" fill-opacity="0.8"/>'


def _stacked(plot: Plot) -> list[Points]:
    """The upper edge of each line when it stands on those before it."""
    heights: dict[float, float] = {}
    edges: list[Points] = []
    for line in plot.lines:
        for when, value in line.points:
            heights[when] = heights.get(when, 0.0) + value
        edges.append([(when, heights[when]) for when, _ in line.points])
    return edges


def runs(points: Points, step_s: float) -> list[list[tuple[float, float]]]:
    """The points, cut where one or more are missing between two of them."""
    found: list[list[tuple[float, float]]] = []
    for point in points:
        if not found or point[0] - found[-1][-1][0] > GAP_STEPS * step_s:
            found.append([])
        found[-1].append(point)
    return found


def _ticks(low: float, high: float, unit: str) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about Y_TICKS of them."""
    base = 1024.0 if unit in ("bytes", "Bps") and high >= 1024 else 10.0
    spread = max(high - low, 1e-9 if unit not in ("none", "short") else 1.0)
    if high == low == 0:
        spread = 1.0
    magnitude = base ** math.floor(math.log(spread / Y_TICKS, base)) if spread / Y_TICKS > 0 else 1.0
    steps = (1, 2, 5, 10) if base == 10 else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    step = next(magnitude * factor for factor in steps if magnitude * factor * Y_TICKS >= spread * 0.999)
    if unit in ("none", "short"):
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), max(math.ceil(high / step - 1e-9), math.floor(low / step) + 1)
    return [step * number for number in range(first, last + 1)]


def _times(seconds: float) -> list[float]:
    step = next(step for step in (5, 10, 20, 30, 60, 120, 300, 600, 3600) if seconds / step <= 8)
    return [float(number * step) for number in range(int(seconds / step) + 1)]


def shown(value: float, unit: str, largest: float) -> str:
    """A value as an axis has it; its prefix is that of the largest."""
    if unit == "s":
        return f"{value:g} s" if largest >= 1 else f"{value * 1000:g} ms"
    if unit in ("bytes", "Bps"):
        power = min(3, int(math.log(largest, 1024))) if largest >= 1024 else 0
        name = ("B", "KiB", "MiB", "GiB")[power] + ("/s" if unit == "Bps" else "")
        return f"{value / 1024**power:.3g} {name}"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    return f"{value:g}/s" if unit == "cps" else f"{value:g}"


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _width(name: str) -> float:
    return 13 + 14 + CHARACTER * len(name)


def _wrapped(lines: Sequence[Line]) -> list[list[int]]:
    """Which lines of the legend stand in which row."""
    rows: list[list[int]] = [[]]
    used = 0.0
    for index, line in enumerate(lines):
        if rows[-1] and used + _width(line.name) > PANEL_WIDTH - LEFT:
            rows.append([])
            used = 0.0
        rows[-1].append(index)
        used += _width(line.name)
    return rows


def _words(text: str, width: float) -> list[str]:
    rows = [""]
    for word in text.split():
        if len(rows[-1]) + len(word) + 1 > width / CHARACTER:
            rows.append("")
        rows[-1] = f"{rows[-1]} {word}".strip()
    return rows
