"""Charts as text of inline SVG: a scatter of points and curves over steps. Colours are the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 28, 42
LETTER = 6.4
"""About the width of a letter of a label."""
LINE = 14
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Point:
    """``colour`` is the number of a colour of the page; hollow points are of what was undone; ``title`` is what a
    pointer over it shows, in place of the label."""

    x: float
    y: float
    label: str
    colour: int
    hollow: bool = False
    title: str = ""


@dataclass(frozen=True)
class Curve:
    """Values after step 1, 2, …; ``worst`` is drawn as the edge of a band above them."""

    label: str
    values: Sequence[float]
    worst: Sequence[float]
    colour: int


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` at pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        if not self.log:
            step = _round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = max(1, len(decades) // 7)
        steps = (1, 2, 5) if self.high / self.low < 200 else (1,)
        values = [m * 10.0**k for k in decades[::every] for m in steps]
        return [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]


def scatter(points: Sequence[Point], x_label: str, y_label: str, line: Sequence[Point] = ()) -> str:
    """Points with their labels, those of ``line`` joined; the x axis is logarithmic where values are far apart."""
    xs, ys = [point.x for point in points], [point.y for point in points]
    log = max(xs) / min(xs) > 4
    wide = (max(xs) / min(xs)) ** 0.12 if log else 0.0
    room = (max(xs) - min(xs)) * 0.12 or max(xs) * 0.2
    x = (
        Axis(min(xs) / (wide or 1), max(xs) * wide, LEFT, WIDTH - RIGHT, True)
        if log
        else Axis(max(0.0, min(xs) - room), max(xs) + room, LEFT, WIDTH - RIGHT)
    )
    gap = (max(ys) - min(ys)) * 0.2 or abs(max(ys)) * 0.05 or 1.0
    y = Axis(min(ys) - gap, max(ys) + gap, HEIGHT - BOTTOM, TOP)
    taken = [(x(point.x) - 6, y(point.y) - 6, x(point.x) + 6, y(point.y) + 6) for point in points]
    marks, labels = [], []
    for point in sorted(points, key=lambda point: -point.y):  # from the top, where labels move away from
        at = x(point.x), y(point.y)
        kind = f'class="hollow" stroke="var(--c{point.colour})"' if point.hollow else f'fill="var(--c{point.colour})"'
        title = f"{point.title or point.label}: {point.x:.4g}, {point.y:.4g}"
        labels += [_label(point.label, at, taken)] if point.label else []
        marks.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="5" {kind}><title>{escape(title)}</title></circle>')
    joined = _points([(x(point.x), y(point.y)) for point in line])
    path = [f'<polyline points="{joined}" stroke="var(--c{line[0].colour})" class="curve"/>'] if line else []
    return _chart([*_axes(x, y, x_label, y_label), *path, *labels, *marks], f"{y_label} against {x_label}")


def curves(lines: Sequence[Curve], x_label: str, y_label: str) -> str:
    """Positive values over steps, on a logarithmic scale, each with the band up to the worst."""
    smallest = 1e-9
    values = [max(value, smallest) for line in lines for value in (*line.values, *line.worst)]
    steps = max(len(line.values) for line in lines)
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)) + 1e-9)
    x = Axis(1, max(steps, 2), LEFT, WIDTH - RIGHT)
    y = Axis(low, high if high > low else low * 10, HEIGHT - BOTTOM, TOP, True)
    drawn = []
    taken: list[tuple[float, float, float, float]] = []
    for line in lines:
        middle, worst = (
            [(x(k + 1), y(max(value, smallest))) for k, value in enumerate(some)] for some in (line.values, line.worst)
        )
        colour = f"var(--c{line.colour})"
        drawn.append(f'<polygon points="{_points([*worst, *middle[::-1]])}" fill="{colour}" opacity=".16"/>')
        drawn.append(f'<polyline points="{_points(middle)}" stroke="{colour}" class="curve"/>')
        drawn.append(_label(line.label, (middle[-1][0], worst[-1][1] - 10), taken))
    return _chart([*_axes(x, y, x_label, y_label), *drawn], f"{y_label} against {x_label}")


def _label(text: str, at: tuple[float, float], taken: list[tuple[float, float, float, float]]) -> str:
    """Beside a point, where nothing is yet, with a line to it if that is not at once beside it; ``taken`` are boxes
    (left, top, right, bottom) and gets this one."""
    width = LETTER * len(text)
    places = [(side, down * LINE) for down in (0, -1, 1, -2, 2, -3, 3) for side in (1, -1)]
    for side, down in places:
        left = at[0] + 9 if side > 0 else at[0] - 9 - width
        box = (left, at[1] + down - LINE / 2, left + width, at[1] + down + LINE / 2)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
        free = all(box[2] < b[0] or box[0] > b[2] or box[3] < b[1] or box[1] > b[3] for b in taken)
        if inside and free:
            break
    taken.append(box)
    line = ""
    if down:
        end = box[0] - 2 if side > 0 else box[2] + 2
        middle = (box[1] + box[3]) / 2
        line = f'<line x1="{at[0]:.1f}" y1="{at[1]:.1f}" x2="{end:.1f}" y2="{middle:.1f}" class="lead"/>'
    return f'{line}<text x="{box[0]:.1f}" y="{box[3] - 3:.1f}" class="label">{escape(text)}</text>'


def _axes(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{_tick(value, y)}</text>')
    for value in x.ticks():
        at = x(value)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}" class="grid"/>'
        )
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_tick(value, x)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" class="axis"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end" class="name">{escape(x_label)}</text>')
    parts.append(f'<text x="2" y="11" class="name">{escape(y_label)}</text>')
    return parts


def _tick(value: float, axis: Axis) -> str:
    if axis.log and axis.low < 1e-3 and value != 1:
        power = math.floor(math.log10(value) + 1e-9)
        times = round(value / 10.0**power)
        return f"{'' if times == 1 else f'{times}·'}10{str(power).translate(SUPERSCRIPTS)}"
    return f"{value:g}"


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * 0.999)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _chart(parts: Sequence[str], title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
