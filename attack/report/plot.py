"""The gradient match over iterations as an inline SVG path: logarithmic upwards, no library and no script."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 320, 120
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """What the page draws, in the units of a box of `WIDTH` x `HEIGHT`."""

    points: str
    """Of an SVG polyline."""
    last: tuple[float, float]
    ticks: tuple[tuple[float, str], ...]
    """Height and text of each horizontal line."""
    end: str
    """The last iteration."""
    label: str
    """What it shows, for those who do not see it."""


def plot(history: Sequence[Sequence[float | None]]) -> Plot | None:
    """Draws (iteration, relative residual); None for fewer than two points above zero."""
    points = [(float(i), math.log10(r)) for i, r in history if i is not None and r is not None and r > 0]
    if len(points) < 2:
        return None
    iterations, logs = [point[0] for point in points], [point[1] for point in points]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    span = max(iterations) - min(iterations) or 1.0

    def across(iteration: float) -> float:
        return round(LEFT + (iteration - min(iterations)) / span * (WIDTH - LEFT - RIGHT), 1)

    def up(log: float) -> float:
        return round(TOP + (high - log) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    stride = max(1, math.ceil((high - low) / 4))
    return Plot(
        points=" ".join(f"{across(i)},{up(log)}" for i, log in points),
        last=(across(iterations[-1]), up(logs[-1])),
        ticks=tuple((up(power), f"1e{power}") for power in range(low, high + 1, stride)),
        end=f"{iterations[-1]:.0f}",
        label=f"Gradient mismatch from {10 ** logs[0]:.1e} to {10 ** logs[-1]:.1e} "
        f"over iterations {iterations[0]:.0f} to {iterations[-1]:.0f}, logarithmic",
    )
