"""Axes, curves and words of a small SVG chart; its bytes follow from the numbers alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

Point = tuple[float, float]

VALUE_TICK, STEP_TICK = 40, 90  # least distance of two ticks, in user units


@dataclass(frozen=True)
class Panel:
    """A rectangle with an axis of steps from 0 and one of values, in user units of the SVG."""

    left: float
    top: float
    width: float
    height: float
    last_step: float
    low: float = 0.0
    high: float = 1.0
    tick: float = 1.0

    def scaled(self, low: float, high: float) -> "Panel":
        """The same with values from the tick at or below ``low`` to that at or above ``high``."""
        if high - low <= 1e-9 * abs(high) or high == low:
            spread = 0.05 * abs(high) or 1.0
            low, high = low - spread, high + spread
        tick = tick_step(high - low, self.height / VALUE_TICK)
        first, last = math.floor(low / tick + 1e-9), math.ceil(high / tick - 1e-9)
        return replace(self, low=first * tick, high=last * tick, tick=tick)

    def x(self, step: float) -> float:
        """Where a step is."""
        return self.left + self.width * step / self.last_step

    def y(self, value: float) -> float:
        """Where a value is; one beyond the axis is at its end."""
        share = (value - self.low) / (self.high - self.low)
        return self.top + self.height * (1 - min(max(share, 0.0), 1.0))

    def axes(self) -> Iterator[str]:
        """Grid lines with their values, and the axis of steps."""
        right, bottom = self.left + self.width, self.top + self.height
        for value in multiples(self.tick, self.low, self.high):
            y = self.y(value)
            yield line("grid", self.left, y, right, y)
            yield text(self.left - 8, y + 4, number(value), "end")
        steps = max(1.0, tick_step(self.last_step, self.width / STEP_TICK))
        for step in multiples(steps, 0, self.last_step):
            x = self.x(step)
            yield line("axis", x, bottom, x, bottom + 4)
            yield text(x, bottom + 18, number(step), "middle")
        yield line("axis", self.left, bottom, right, bottom)
        yield text(self.left + self.width / 2, bottom + 36, "optimizer step", "middle")

    def curve(self, points: Sequence[Point], name: str, dots: int = 1) -> Iterator[str]:
        """A line through points; each has a dot where there are at most ``dots``."""
        drawn = [(self.x(step), self.y(value)) for step, value in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        yield f'<polyline class="line {name}" points="{path}"/>'
        if len(drawn) <= dots:
            yield from (dot(x, y, name) for x, y in drawn)


def tick_step(span: float, wanted: float) -> float:
    """1, 2 or 5 times a power of ten, so that ``wanted`` ticks or a few less fill the span."""
    rough = span / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))


def multiples(step: float, low: float, high: float) -> list[float]:
    """All multiples of ``step`` from ``low`` to ``high``."""
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """Short: 2e-4 rather than 0.0002, and 12,000."""
    if value and not 1e-2 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def text(x: float, y: float, words: str, name: str = "") -> str:
    """Words that begin at ``x``; with ``end`` or ``middle`` in ``name``, that end or centre there.

    They are trusted: nothing in them is escaped.
    """
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}">{words}</text>'


def line(name: str, x: float, y: float, x2: float, y2: float) -> str:
    """A straight line."""
    return f'<line class="{name}" x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def dot(x: float, y: float, name: str) -> str:
    """A small ring."""
    return f'<circle class="dot {name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
