"""Line charts as SVG text: no plotting library, no script, colours from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Point = tuple[float, float]

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 12, 38
MAX_POINTS, MAX_RINGS = 300, 40


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: Its name in the legend.
        points: (step, value), sorted by step; a value that is not finite leaves a gap.
        color: Number of its colour in the style sheet, 0 to 3.
        held_out: Whether it was measured at evaluations: drawn as rings on a dashed line.
    """

    label: str
    points: Sequence[Point]
    color: int = 0
    held_out: bool = False

    @property
    def last(self) -> float | None:
        """The last finite value, None where there is none."""
        return next((y for _, y in reversed(self.points) if math.isfinite(y)), None)


def number(value: float) -> str:
    """Writes a value in a few characters: ``0.0521``, ``12.3k``, ``5e-6``."""
    size = abs(value)
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    if size == 0:
        return "0"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def percent(value: float) -> str:
    """Writes a fraction as a percentage."""
    return f"{100 * value:.3g}%" if math.isfinite(value) else number(value)


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Returns about ``count`` round numbers that cover ``low`` to ``high``.

    Args:
        low: Smallest value to cover.
        high: Largest value, above ``low``.
        count: Intervals wanted.
        whole: Whether they must be whole numbers.

    Returns:
        Ascending multiples of 1, 2 or 5 times a power of ten, from at most ``low`` to at least ``high``.
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def steps_per_point(points: Sequence[Point]) -> int:
    """Returns how many neighbouring steps share one point of a training curve."""
    return max(1, math.ceil(len(points) / MAX_POINTS))


def thin(series: Series) -> list[Point]:
    """Returns the points to draw: a long training curve is averaged, of many evaluations some are taken.

    Args:
        series: The curve.

    Returns:
        At most ``MAX_POINTS`` means of neighbouring points, those that are not finite apart; or the first, the last
        and evaluations between them, about ``MAX_RINGS``.
    """
    points = series.points
    if series.held_out:
        return [*points[:-1][:: max(1, math.ceil(len(points) / MAX_RINGS))], *points[-1:]]
    size, thinned = steps_per_point(points), []
    for i in range(0, len(points), size):
        bucket = [point for point in points[i : i + size] if math.isfinite(point[1])] or points[i : i + 1]
        thinned.append((bucket[-1][0], sum(y for _, y in bucket) / len(bucket)))
    return thinned


def chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    show: Callable[[float], str] = number,
    bounds: tuple[float | None, float | None] = (None, None),
) -> str:
    """Draws one chart with its heading and legend.

    Args:
        title: Heading.
        unit: What the vertical axis measures.
        series: Curves; one without any finite value is left out.
        show: Writes a value for ticks, legend and tool tips.
        bounds: Lowest and highest value that the vertical axis must reach.

    Returns:
        A ``figure`` element.
    """
    named = [s for s in series if s.last is not None]
    drawn = [Series(s.label, thin(s), s.color, s.held_out) for s in named]
    heading = f"<h3>{html.escape(title)} <small>{html.escape(unit)}</small></h3>"
    if not drawn:
        return f'<figure>{heading}<p class="empty">Not recorded in this run.</p></figure>'
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points if math.isfinite(y)] + [b for b in bounds if b is not None]
    x_axis, y_axis = _axis(min(xs), max(xs), 6, whole=True), _axis(min(ys), max(ys), 5)
    scale = _Scale(min(xs), max(xs), y_axis[0], y_axis[-1])
    parts = [*_grid(x_axis, y_axis, scale, show), *(part for s in drawn for part in _curve(s, scale, show))]
    legend = "".join(
        f'<li class="c{s.color}{" ring" if s.held_out else ""}"><i></i>{html.escape(s.label)}'
        f" <b>{show(s.last)}</b></li>"
        for s in named
        if s.last is not None
    )
    label = html.escape(f"{title}, {unit}, over steps {min(xs):g} to {max(xs):g}")
    return (
        f'<figure>{heading}<ul class="legend">{legend}</ul><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _axis(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Returns the ticks of an axis, also where all values are equal."""
    if low == high:
        if whole:
            return [low]
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    return ticks(low, high, count, whole)


@dataclass(frozen=True)
class _Scale:
    """Turns values into positions in the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        if self.x_low == self.x_high:
            return (LEFT + WIDTH - RIGHT) / 2
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _grid(
    x_axis: Sequence[float], y_axis: Sequence[float], scale: _Scale, show: Callable[[float], str]
) -> Iterator[str]:
    """Draws lines and numbers of both axes."""
    for value in y_axis:
        y = scale.y(value)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{show(value)}</text>'
    for value in x_axis:
        if scale.x_low <= value <= scale.x_high:
            x = scale.x(value)
            yield f'<path class="grid" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>'
            yield f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:,.0f}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">optimizer step</text>'


def _curve(series: Series, scale: _Scale, show: Callable[[float], str]) -> Iterator[str]:
    """Draws one curve: a line that breaks at gaps, marks where there is no line, and a tool tip at every point."""
    path, pen_down = [], False
    finite = [(x, y) for x, y in series.points if math.isfinite(y)]
    for x, y in finite if series.held_out else series.points:
        if math.isfinite(y):
            path.append(f"{'L' if pen_down else 'M'}{scale.x(x):.1f} {scale.y(y):.1f}")
        pen_down = math.isfinite(y)
    ring = " ring" if series.held_out else ""
    yield f'<path class="line c{series.color}{ring}" d="{"".join(path)}"/>'
    for x, y in finite:
        mark = "mark" if series.held_out or len(finite) == 1 else "hit"
        tip = html.escape(f"{series.label}, step {x:,.0f}: {show(y)}")
        yield (
            f'<circle class="{mark} c{series.color}{ring}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="4">'
            f"<title>{tip}</title></circle>"
        )
